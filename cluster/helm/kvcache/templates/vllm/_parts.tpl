{{- /* Environment of our own processes beside or without an engine: they write to /tmp alone. */ -}}
{{- define "kvcache.serviceEnv" -}}
- {name: HOME, value: /tmp}
- {name: HF_HOME, value: /tmp/hugging-face} # of the tokenizer
- {name: NUMBA_CACHE_DIR, value: /tmp/numba}
{{- include "kvcache.tokenEnv" . }}
{{- end -}}

{{- define "kvcache.vllmKey" -}}
{{- with .Values.vllm.apiKey }}
{{- if .existingSecret }}
- name: VLLM_API_KEY
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret }}, key: {{ .key }}}
{{- end }}
{{- end }}
{{- end -}}
