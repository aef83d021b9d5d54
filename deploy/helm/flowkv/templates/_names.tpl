{{/* Labels of what belongs to a component. Takes (dict "root" $ "component" NAME). */}}
{{- define "flowkv.labels" -}}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{ include "flowkv.selector" . }}
{{- end }}

{{/* What a selector finds a component by. */}}
{{- define "flowkv.selector" -}}
app.kubernetes.io/name: flowkv
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Takes (dict "root" $ "image" "control"). */}}
{{- define "flowkv.image" -}}
{{- $image := index .root.Values.images .image -}}
{{ $image.repository }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* The NATS chart's name for its own objects. */}}
{{- define "flowkv.natsName" -}}
{{- if contains "nats" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-nats{{ end }}
{{- end }}

{{/* Where a model's link lies in the volume: another source has another link. */}}
{{- define "flowkv.modelPath" -}}
/models/{{ .name }}-{{ .source | sha256sum | trunc 8 }}
{{- end }}

{{/* What clients call a model. */}}
{{- define "flowkv.servedName" -}}
{{ .servedName | default .source | default "SmolLM2-135M-Instruct" }}
{{- end }}

{{/* A model's values for nodes, as JSON. Takes (dict "root" $ "model" MODEL). */}}
{{- define "flowkv.nodesOf" -}}
{{- $nodes := mergeOverwrite (deepCopy .root.Values.nodes) (deepCopy (.model.nodes | default dict)) -}}
{{- if $nodes.gpu.enabled -}}
{{- $_ := set $nodes "settings" (mergeOverwrite $nodes.settings $nodes.gpu.settings) -}}
{{- end -}}
{{ toJson $nodes }}
{{- end }}
