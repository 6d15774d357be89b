{{- define "kube2ram.name" -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "kube2ram.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "kube2ram.name" .) -}}
{{- end -}}

{{- /* A node has one agent, whatever releases are called. */ -}}
{{- define "kube2ram.selector" -}}
app.kubernetes.io/name: kube2ram
{{- end -}}

{{- define "kube2ram.labels" -}}
{{ include "kube2ram.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- /* Labels or annotations, of which --set makes numbers and booleans where they look like it. */ -}}
{{- define "kube2ram.strings" -}}
{{- $lines := list -}}
{{- range $key, $value := . -}}
{{- $isWhole := and (kindIs "float64" $value) (eq (floor $value) $value) -}}
{{- $text := ternary (int64 $value | toString) (toString $value) $isWhole -}}
{{- $lines = append $lines (printf "%s: %s" $key (quote $text)) -}}
{{- end -}}
{{- join "\n" $lines -}}
{{- end -}}

{{- define "kube2ram.updateStrategy" -}}
{{- with .Values.updateStrategy -}}
type: {{ .type }}
{{- if eq .type "RollingUpdate" }}
{{- with .rollingUpdate }}
{{- $surges := not (has (toString .maxSurge) (list "0" "0%")) }}
{{- $misses := not (has (toString .maxUnavailable) (list "0" "0%")) }}
{{- if eq $surges $misses }}{{ fail "updateStrategy.rollingUpdate: one of maxSurge and maxUnavailable must be 0, and the other one not" }}{{ end }}
rollingUpdate: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}
{{- end -}}

{{- define "kube2ram.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end -}}
{{- end -}}
{{- end -}}

{{- /* The value of a flag, as it was set or as the agent has it: (list $ "state-dir" "/run/kube2ram"). */ -}}
{{- define "kube2ram.flag" -}}
{{- $value := index (index . 0).Values.flags (index . 1) -}}
{{- if kindIs "invalid" $value }}{{ index . 2 }}{{ else }}{{ $value }}{{ end -}}
{{- end -}}

{{- /* The key of an annotation, as it was set or as it usually is in the cloud: (list $ "namespace-key" "allowed-roles"). */ -}}
{{- define "kube2ram.key" -}}
{{- $domain := ternary "iam.amazonaws.com" "ram.aliyuncs.com" (eq (index . 0).Values.cloud "aws") -}}
{{- include "kube2ram.flag" (list (index . 0) (index . 1) (printf "%s/%s" $domain (index . 2))) -}}
{{- end -}}

{{- /* The key of pods' roles, by either name of the flag. The agent uses ram-role-key if both are set. */ -}}
{{- define "kube2ram.roleKey" -}}
{{- $usual := include "kube2ram.key" (list . "iam-role-key" "role") -}}
{{- include "kube2ram.flag" (list . "ram-role-key" $usual) -}}
{{- end -}}

{{- /* Where a pod asks for its role. */ -}}
{{- define "kube2ram.list" -}}
{{- if eq .Values.cloud "aws" -}}
http://169.254.169.254/latest/meta-data/iam/security-credentials/
{{- else -}}
http://100.100.100.200/latest/meta-data/ram/security-credentials/
{{- end -}}
{{- end -}}

{{- /* What asks this container's agent: (list $ "ready"). */ -}}
{{- define "kube2ram.probe" -}}
command:
  - /usr/local/bin/kube2ram
  - {{ index . 1 }}
  {{- range $flag := list "pod-dir" "state-dir" }}
  {{- with include "kube2ram.flag" (list (index $ 0) $flag "") }}
  - --{{ $flag }}={{ . }}
  {{- end }}
  {{- end }}
{{- end -}}

{{- define "kube2ram.args" -}}
{{- range $name, $value := .Values.flags }}
{{- if kindIs "invalid" $value }}
{{- else if and (kindIs "bool" $value) $value }}
- --{{ $name }}
{{- else if kindIs "float64" $value }}
- --{{ $name }}={{ int64 $value }}
{{- else }}
- {{ printf "--%s=%v" $name $value | quote }}
{{- end }}
{{- end }}
{{- if .Values.startupTaint.enabled }}
- {{ printf "--startup-taint=%s" .Values.startupTaint.taint | quote }}
{{- end }}
{{- if eq .Values.credentialsFrom "service-account" }}
{{- if .Values.oidc.enabled }}
{{- fail "oidc gives the agent a role of its own, which it does not use with credentialsFrom: service-account. Set oidc.enabled: false" }}
{{- end }}
{{- else if .Values.serviceAccountRoles }}
- --service-account-roles
{{- end }}
{{- with .Values.auditFile }}
- {{ printf "--audit-file=%s" . | quote }}
{{- end }}
{{- range .Values.extraArgs }}
{{- /* Probes, mounts, rights, the boot guard, the admission policy, the PodMonitor or the notes go by these. */ -}}
{{- with regexFind "^--?(audit-file|bpf-dir|cgroup-root|cloud|credentials-from|forward-guard|iam-role-key|metadata-addr6?|metrics-port|namespace-key|namespace-restrictions|oidc-provider-arn|pod-dir|ram-role-key|service-account-roles|startup-taint|state-dir|token-requests-as)\\b" . }}
{{- fail (printf "%s is for flags or its own value, not for extraArgs: more than the agent's arguments follows from it" .) }}
{{- end }}
- {{ . | quote }}
{{- end }}
{{- range .Values.extraEnv }}
{{- if eq "KUBE2RAM_CLOUD" .name }}
{{- fail "KUBE2RAM_CLOUD follows from the value cloud: set cloud, and no variable under extraEnv" }}
{{- else if hasPrefix "KUBE2RAM_" .name }}
{{- fail (printf "%s is a flag: set it under flags, not under extraEnv" .name) }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "kube2ram.bootGuardArgs" -}}
{{- range .Values.bootGuard.args }}
{{- with regexFind "^--?cloud\\b" . }}
{{- fail (printf "%s follows from the value cloud: set cloud, and no argument under bootGuard.args" .) }}
{{- end }}, {{ . | quote }}
{{- end }}
{{- end -}}

{{- /* The audience of tokens that the cloud's STS takes. */ -}}
{{- define "kube2ram.audience" -}}
{{- ternary "sts.amazonaws.com" "sts.aliyuncs.com" (eq .Values.cloud "aws") -}}
{{- end -}}

{{- /* The ways of requesting tokens whose rights are rendered, as JSON: the agents' own way, and those of agents that still run or are yet to come. */ -}}
{{- define "kube2ram.tokenRights" -}}
{{- $own := ternary (list .Values.tokenRequests) (list) (eq .Values.credentialsFrom "service-account") -}}
{{- concat $own .Values.tokenRights | uniq | toJson -}}
{{- end -}}

{{- /* Whether the agent gets ServiceAccounts by its own right: "yes" or nothing. */ -}}
{{- define "kube2ram.getsServiceAccounts" -}}
{{- $rights := include "kube2ram.tokenRights" . | fromJsonArray -}}
{{- $isOfNode := and (eq .Values.credentialsFrom "node") .Values.serviceAccountRoles -}}
{{- if or $isOfNode (has "agent" $rights) (has "namespaces" $rights) }}yes{{ end -}}
{{- end -}}

{{- /* The labels of the policies on tokens, by which they can be applied before the right. */ -}}
{{- define "kube2ram.tokenPolicyLabels" -}}
{{ include "kube2ram.labels" . }}
app.kubernetes.io/component: token-policies
{{- end -}}

{{- /* The requests that the policies on tokens judge. */ -}}
{{- define "kube2ram.tokenConstraints" -}}
resourceRules:
  - apiGroups: [""]
    apiVersions: ["v1"]
    resources: ["serviceaccounts/token"]
    operations: ["CREATE"]
{{- end -}}

{{- /* Whose requests these policies judge. */ -}}
{{- define "kube2ram.tokenConditions" -}}
- name: by-the-agent
  expression: request.userInfo.username == "system:serviceaccount:{{ .Release.Namespace }}:{{ include "kube2ram.serviceAccount" . }}"
{{- end -}}

{{- /* What the token is bound to. Its field is null in a request without a binding. */ -}}
{{- define "kube2ram.tokenBinding" -}}
has(object.spec.boundObjectRef) && object.spec.boundObjectRef != null ? object.spec.boundObjectRef : {}
{{- end -}}

{{- /* Where the audit trail is, unless that is mounted anyway. */ -}}
{{- define "kube2ram.auditDir" -}}
{{- with .Values.auditFile }}
{{- $directory := dir . }}
{{- if ne $directory (include "kube2ram.flag" (list $ "state-dir" "/run/kube2ram")) }}{{ $directory }}{{ end -}}
{{- end -}}
{{- end -}}

{{- /* AppArmor is a field since 1.30. */ -}}
{{- define "kube2ram.hasAppArmorField" -}}
{{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}yes{{ end -}}
{{- end -}}
