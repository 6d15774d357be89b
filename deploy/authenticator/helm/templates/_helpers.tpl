{{- define "authenticator.name" -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "authenticator.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "authenticator.name" .) -}}
{{- end -}}

{{- /* A node has one port for it, whatever releases are called. */ -}}
{{- define "authenticator.selector" -}}
app.kubernetes.io/name: kube2ram-authenticator
{{- end -}}

{{- define "authenticator.labels" -}}
{{ include "authenticator.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "authenticator.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end -}}
{{- end -}}
{{- end -}}
