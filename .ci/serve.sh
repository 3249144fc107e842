#!/bin/bash
# Serve a tiny model with that vLLM: serve.sh VENV MODEL_DIR PORT [extra vllm arguments]    stop it with: kill $(cat MODEL_DIR/PORT.pid)
set -u
venv=$1 model=$2 port=$3; shift 3
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
setsid "$venv/bin/python" -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name parrot --host 127.0.0.1 --port "$port" \
  --max-model-len 2048 --enforce-eager --dtype bfloat16 --max-num-seqs 64 --enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3 \
  "$@" > "$model/$port.log" 2>&1 < /dev/null & echo $! > "$model/$port.pid"
for second in $(seq 1 180); do
  sleep 1
  [ "$(curl -s --noproxy '*' -o /dev/null -w '%{http_code}' "http://127.0.0.1:$port/health")" = 200 ] && { echo "up after $second s on port $port"; exit 0; }
  kill -0 "$(cat "$model/$port.pid")" 2>/dev/null || { tail -20 "$model/$port.log"; echo "vLLM did not start"; exit 1; }
done
echo "vLLM was not up after 180 s"; exit 1
