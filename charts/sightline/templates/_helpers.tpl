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
