#!/usr/bin/env bash
# The whole Inference service by hand, with `grpcurl`. The gateway tells it the
# types by reflection, which is on for loopback addresses.
#
#   examples/grpcurl.sh [HOST:PORT]
set -euo pipefail

target=${1:-127.0.0.1:50051}
grpcurl=${GRPCURL:-grpcurl}

call() { # METHOD JSON
  printf '\n$ %s %s\n' "$1" "$2"
  "$grpcurl" -plaintext -d "$2" "$target" "lora_gateway.v1.Inference/$1"
}

"$grpcurl" -plaintext "$target" list
call GetModel '{}'
call Tokenize '{"text": "Ahoy there", "return_tokens": true}'

question='"chat": {"messages": [{"role": "user", "content": "Tell me about the sea."}]}'
sampling='"sampling": {"max_tokens": 16, "temperature": 0}'
call Generate "{$question, $sampling}"
call GenerateStream "{$question, $sampling}"
call GenerateStream "{\"adapter\": \"pirate\", $question, $sampling}"

# Errors carry a code, a reason, and all that is wrong with the request at once.
# The exit status of grpcurl is the code plus 64.
status=0
call Generate '{"text": "hi", "sampling": {"top_p": 3, "max_tokens": 0}}' || status=$?
if [[ $status -ne $((64 + 3)) ]]; then # 3: INVALID_ARGUMENT
  echo "expected INVALID_ARGUMENT" >&2
  exit 1
fi
