{{- define "edge.name" -}}
{{- if contains "edge" .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-edge" .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "edge.selector" -}}
app.kubernetes.io/name: mysocket-edge
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "edge.labels" -}}
{{ include "edge.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "edge.image" -}}
{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote }}
{{- end }}

{{/* Where the control plane and the sidecars find the edge inside of the cluster. */}}
{{- define "edge.apiHost" -}}{{ include "edge.name" . }}-api.{{ .Release.Namespace }}.svc{{- end }}
{{- define "edge.sshHost" -}}{{ include "edge.name" . }}-ssh.{{ .Release.Namespace }}.svc{{- end }}

{{/* A value as a flag takes it: 1000000 and not 1e+06, a list with commas. */}}
{{- define "edge.flagValue" -}}
{{- if kindIs "slice" . }}{{ join "," . }}
{{- else if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}
{{- else }}{{ . }}
{{- end }}
{{- end }}

{{/* Everything of containers that does not depend on what they run. */}}
{{- define "edge.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
