{{- define "mysocket.name" -}}
{{ printf "%s-injector" .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "mysocket.selector" -}}
app.kubernetes.io/name: mysocket-injector
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "mysocket.labels" -}}
{{ include "mysocket.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Not those of mysocket.selector: the Job's pod is none of the control plane's. */}}
{{- define "mysocket.cleanupLabels" -}}
app.kubernetes.io/name: mysocket-injector-cleanup
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "mysocket.accountSecret" -}}
{{- if .Values.account.existingSecret }}
{{- if or .Values.account.email .Values.account.password }}
{{- fail "account.existingSecret is set, and so is account.email or account.password: give one or the other" }}
{{- end }}
{{- .Values.account.existingSecret }}
{{- else }}
{{- if not (and .Values.account.email .Values.account.password) }}
{{- fail "the Mysocket account is missing: set account.email and account.password, or account.existingSecret (a Secret with the keys email and password)" }}
{{- end }}
{{- include "mysocket.name" . }}-account
{{- end }}
{{- end }}

{{/* Names that the program and the templates must agree on. */}}
{{- define "mysocket.webhookService" -}}{{ include "mysocket.name" . }}-webhook{{- end }}
{{- define "mysocket.gatewayService" -}}{{ include "mysocket.name" . }}-gateway{{- end }}
{{- define "mysocket.webhookConfiguration" -}}{{ include "mysocket.name" . }}.{{ .Release.Namespace }}.mysocket.io{{- end }}
{{- define "mysocket.certificateSecret" -}}{{ include "mysocket.name" . }}-certificates{{- end }}
{{- define "mysocket.certificate" -}}{{ include "mysocket.name" . }}-serving{{- end }}
{{- define "mysocket.issuedSecret" -}}{{ include "mysocket.name" . }}-serving-tls{{- end }}
{{- define "mysocket.lease" -}}{{ include "mysocket.name" . }}{{- end }}
