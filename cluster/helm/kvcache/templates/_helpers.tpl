{{- define "kvcache.name" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Of a list (top, component): what selects its pods. KubeRay sets app.kubernetes.io/name itself, so it is not among them. */ -}}
{{- define "kvcache.selector" -}}
{{- $top := index . 0 -}}
app.kubernetes.io/instance: {{ $top.Release.Name }}
app.kubernetes.io/part-of: kvcache
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "kvcache.labels" -}}
{{- $top := index . 0 -}}
{{ include "kvcache.selector" . }}
app.kubernetes.io/version: {{ $top.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $top.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $top.Chart.Name $top.Chart.Version }}
{{- end -}}

{{- define "kvcache.image" -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag }}
{{- end -}}
{{- end -}}

{{- define "kvcache.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "kvcache.name" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{- /* What every pod has. */ -}}
{{- define "kvcache.pod" -}}
serviceAccountName: {{ include "kvcache.serviceAccount" . }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* Of a list (top, component, placement): where its pods go. */ -}}
{{- define "kvcache.placement" -}}
{{- $top := index . 0 -}}
{{- $placement := index . 2 -}}
{{- with $top.Values.topologySpread }}
{{- if .enabled }}
topologySpreadConstraints:
  - maxSkew: {{ .maxSkew }}
    topologyKey: {{ .topologyKey }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "kvcache.selector" (list $top (index $ 1)) | nindent 8 }}
{{- end }}
{{- end }}
{{- with $placement.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $placement.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* Of our own processes: no root, no rights, nothing to write to. */ -}}
{{- define "kvcache.restricted" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- /* Of an engine, whose image says which user it is. */ -}}
{{- define "kvcache.engineSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "kvcache.redisSecret" -}}
{{- if .Values.redis.url -}}
{{ .Values.redis.existingSecret }}
{{- else -}}
{{ default (printf "%s-valkey" (include "kvcache.name" .)) .Values.valkey.auth.existingSecret }}
{{- end -}}
{{- end -}}

{{- /* As publishers, routers and the score service are given it: the password stays in its file. */ -}}
{{- define "kvcache.redisUrl" -}}
{{- if not .Values.redis.url -}}
redis://kvcache-writer@{{ include "kvcache.name" . }}-valkey:6379?password_file=/run/secrets/kvcache-redis/password
{{- else if .Values.redis.existingSecret -}}
{{ .Values.redis.url }}{{ ternary "&" "?" (contains "?" .Values.redis.url) }}password_file=/run/secrets/kvcache-redis/password
{{- else -}}
{{ .Values.redis.url }}
{{- end -}}
{{- end -}}

{{- define "kvcache.redisMount" -}}
{{- if include "kvcache.redisSecret" . }}
- {name: redis-password, mountPath: /run/secrets/kvcache-redis, readOnly: true}
{{- end }}
{{- end -}}

{{- define "kvcache.redisVolume" -}}
{{- with include "kvcache.redisSecret" . }}
- name: redis-password
  secret:
    secretName: {{ . }}
    items: [{key: {{ ternary $.Values.redis.passwordKey "writer-password" (ne $.Values.redis.url "") }}, path: password}]
{{- end }}
{{- end -}}

{{- define "kvcache.keysMount" -}}
{{- if .Values.apiKeys.existingSecret }}
- {name: api-keys, mountPath: /run/secrets/kvcache-keys, readOnly: true}
{{- end }}
{{- end -}}

{{- define "kvcache.keysVolume" -}}
{{- with .Values.apiKeys }}
{{- if .existingSecret }}
- name: api-keys
  secret:
    secretName: {{ .existingSecret }}
    items: [{key: {{ .key }}, path: keys.yaml}]
{{- end }}
{{- end }}
{{- end -}}

{{- /* Environment of an engine: where models are kept, and the token that loads them. */ -}}
{{- define "kvcache.modelEnv" -}}
{{- if .Values.modelCache.enabled }}
- {name: HF_HOME, value: {{ .Values.modelCache.mountPath }}}
{{- end }}
{{- include "kvcache.tokenEnv" . }}
{{- end -}}

{{- define "kvcache.tokenEnv" -}}
{{- with .Values.huggingFace }}
{{- if or .existingSecret .token }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ default (printf "%s-hugging-face" (include "kvcache.name" $)) .existingSecret }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "kvcache.modelMount" -}}
{{- if .Values.modelCache.enabled }}
- {name: models, mountPath: {{ .Values.modelCache.mountPath }}}
{{- end }}
{{- end -}}

{{- /* Of our own processes, which read a tokenizer there if the model is a path. */ -}}
{{- define "kvcache.modelMountToRead" -}}
{{- if .Values.modelCache.enabled }}
- {name: models, mountPath: {{ .Values.modelCache.mountPath }}, readOnly: true}
{{- end }}
{{- end -}}

{{- define "kvcache.modelVolume" -}}
{{- with .Values.modelCache }}
{{- if .enabled }}
- name: models
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-models" (include "kvcache.name" $)) .existingClaim }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* A StatefulSet makes the claims itself, one for each replica. */ -}}
{{- define "kvcache.cachePerReplica" -}}
{{- if and (eq .Values.mode "vllm") (eq .Values.vllm.kind "StatefulSet") .Values.modelCache.enabled (not .Values.modelCache.existingClaim) -}}
yes
{{- end -}}
{{- end -}}

{{- define "kvcache.claimSpec" -}}
accessModes:
  {{- toYaml .accessModes | nindent 2 }}
{{- with .storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .size }}
{{- end -}}

{{- /* A rule of a NetworkPolicy: peers (none: everybody), ports. */ -}}
{{- define "kvcache.allow" -}}
- ports:
    {{- range index . 1 }}
    - {port: {{ . }}}
    {{- end }}
  {{- with index . 0 }}
  from:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "kvcache.scores" -}}
{{- if and (eq .Values.mode "vllm") .Values.scores.enabled -}}
yes
{{- end -}}
{{- end -}}

{{- define "kvcache.picker" -}}
{{- if and (include "kvcache.scores" .) (ne .Values.gateway.kind "none") -}}
yes
{{- end -}}
{{- end -}}
