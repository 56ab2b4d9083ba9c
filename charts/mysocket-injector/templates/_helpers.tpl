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
{{- if or .Values.account.email .Values.account.password .Values.account.token }}
{{- fail "account.existingSecret is set, and so is account.email, account.password or account.token: give one or the other" }}
{{- end }}
{{- .Values.account.existingSecret }}
{{- else }}
{{- if .Values.account.token }}
{{- if or .Values.account.email .Values.account.password }}
{{- fail "account.token is set, and so is account.email or account.password: an account is used with an access token, or with e-mail and password" }}
{{- end }}
{{- if eq .Values.mysocket.api "https://api.mysocket.io" }}
{{- fail "account.token is set, and mysocket.api is https://api.mysocket.io, which takes no access tokens: set mysocket.api and mysocket.ssh to https://api.border0.com/api/v1 and tunnel.border0.com:22, or to an edge of your own" }}
{{- end }}
{{- else if not (and .Values.account.email .Values.account.password) }}
{{- fail "the Mysocket account is missing: set account.email and account.password, or account.token, or account.existingSecret (a Secret with the keys email and password, or with the key token)" }}
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
