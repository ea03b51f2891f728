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

{{/* Refuses a model that is known and does not fit the profile's GPUs, by `sightline fit`. Takes root, key (its place in the
values), kind, model, bits (empty: what the predictor chooses), gpus, and isAlone: only one sequence must fit. */}}
{{- define "sightline.fits" -}}
{{- $fits := .root.Files.Get "files/fits.yaml" | fromYaml }}
{{- $way := .bits }}
{{- if or (not $way) (eq $way "auto") }}{{ $way = get $fits.default .kind }}{{ end }}
{{- $memory := mul (get $fits.memory .root.Values.profile | default 0) (int .gpus) }}
{{- $needs := get (get $fits.needs .model | default dict) $way | default dict }}
{{- if and $needs $memory }}
{{- $need := int (ternary $needs.one $needs.usual .isAlone) }}
{{- if gt $need (int $memory) }}
{{- fail (printf "%s: %s (%s) needs %.1f GiB and does not fit profile %s, whose GPUs have %.1f for it: take a larger profile, another model, fewer bits or a smaller MAX_BATCH; `sightline fit` shows what there is" .key .model $way (divf $need 1024) .root.Values.profile (divf $memory 1024)) }}
{{- end }}
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
