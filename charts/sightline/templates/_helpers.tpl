{{- define "sightline.name" -}}
{{- if contains "sightline" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-sightline" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "sightline.image" -}}
{{- printf "%s%s:%s" .root.Values.imagePrefix .name (.root.Values.imageTag | default .root.Chart.AppVersion) -}}
{{- end }}

{{/* Of every object. Takes root and component. */}}
{{- define "sightline.labels" -}}
{{ include "sightline.selector" . }}
app.kubernetes.io/part-of: sightline
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "sightline.selector" -}}
app.kubernetes.io/name: sightline-{{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{/* What a profile says. A GPU profile that does not exist is refused by the schema. */}}
{{- define "sightline.profile" -}}
{{- get (.Files.Get "files/profiles.yaml" | fromYaml) .Values.profile | toYaml -}}
{{- end }}

{{/* How a predictor's replicas follow the load: its own word, or that of all. Takes root and kind. */}}
{{- define "sightline.autoscaling" -}}
{{- (get .root.Values.predictors .kind).autoscaling | default .root.Values.models.autoscaling | toYaml -}}
{{- end }}

{{/* The claim of the hub's cache; empty: there is none. */}}
{{- define "sightline.cacheClaim" -}}
{{- with .Values.models.cache }}
{{- .claimName | default (ternary (printf "%s-cache" (include "sightline.name" $)) "" (ne .size "")) -}}
{{- end }}
{{- end }}

{{/* Refuses a model whose weights, and a sixth of the GPU beside them, are more than the profile's GPUs have. Takes root, key (its
place in the values), model, bits (empty: what the predictor chooses, so the fewest) and gpus. */}}
{{- define "sightline.fits" -}}
{{- $known := get (.root.Files.Get "files/weights.yaml" | fromYaml) .model | default dict }}
{{- $needed := 0.0 }}
{{- if .bits }}
{{- $needed = get $known .bits | default 0.0 }}
{{- else if $known }}
{{- $needed = get $known "8bit" | default (get $known "none") }}
{{- end }}
{{- $has := mulf (regexFind "[0-9]+$" .root.Values.profile | float64) (float64 .gpus) }}
{{- if gt (mulf (float64 $needed) 1.2) $has }}
{{- fail (printf "%s: %s (%.1f GiB of weights%s) does not fit profile %s, %v GiB of which a sixth stays free: choose a larger profile or another model" .key .model (float64 $needed) (ternary (printf ", quantization %s" .bits) "" (ne .bits "")) .root.Values.profile $has) }}
{{- end }}
{{- end }}

{{- define "sightline.keySecret" -}}
{{- .Values.apiKey.existingSecret | default (printf "%s-keys" (include "sightline.name" .)) -}}
{{- end }}

{{/* Restricted Pod Security. */}}
{{- define "sightline.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "sightline.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
