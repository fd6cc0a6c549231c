{{- define "kvcache.rayEnv" -}}
{{- with .Values.rayservice }}
{{- if .directStreaming }}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
- {name: RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING, value: "1"}
- {name: RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY, value: "1"}
- {name: RAY_SERVE_INGRESS_ROUTER_REPLICAS_PER_NODE, value: {{ .routersPerNode | quote }}}
{{- end }}
{{- end }}
{{- include "kvcache.modelEnv" . }}
{{- with .Values.rayservice.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Of a list (top, group): resources, rights and mounts. */ -}}
{{- define "kvcache.rayContainer" -}}
{{- $top := index . 0 -}}
resources:
  {{- toYaml (index . 1).resources | nindent 2 }}
securityContext:
  {{- include "kvcache.engineSecurity" $top | nindent 2 }}
volumeMounts:
  - {name: shm, mountPath: /dev/shm}
  {{- include "kvcache.redisMount" $top | nindent 2 }}
  {{- include "kvcache.keysMount" $top | nindent 2 }}
  {{- include "kvcache.modelMount" $top | nindent 2 }}
{{- end -}}

{{- define "kvcache.rayVolumes" -}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.rayservice.shmSize }}}
{{- include "kvcache.redisVolume" . }}
{{- include "kvcache.keysVolume" . }}
{{- include "kvcache.modelVolume" . }}
{{- end -}}
