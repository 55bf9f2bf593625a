"""A finished run behind an OpenAI-compatible address.

asked      a request, and what of OpenAI's protocol is refused
line       the line in which requests wait, and the thread that answers them in batches
replies    completions, pieces of streams and errors, as OpenAI's own types have them
address    where it listens, and whether a token is needed
gate       who may come in: token, hosts, size
app        the addresses
local      one process that serves, and how it ends
vllm       which adapters vLLM can serve, and what it is told
rayserve   Ray Serve with vLLM (R)

`transformers serve` (5.23) brings handlers of its own, which don't do here: it answers requests one by one, unless by
continuous batching, which takes the settings of the first request for all and fails on DeepSeek's attention, whose
keys and values differ in width; it renders prompts without the care for control tokens that training takes; `stop`
remains in the text, `n` and `stream_options` are ignored; and it loads models by name, not an adapter with its base.
"""
