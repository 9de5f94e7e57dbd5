#!/usr/bin/env bash
# The whole Inference service by hand, and how to follow a job of Training, with
# `buf curl`. The gateway tells it the types by reflection, which is on for loopback
# addresses.
#
#   examples/bufcurl.sh [HOST:PORT]
set -euo pipefail

target=${1:-127.0.0.1:50051}
buf=${BUF:-buf}

rpc() { # SERVICE/METHOD JSON
  "$buf" curl --protocol grpc --http2-prior-knowledge --reflect \
    --data "$2" "http://$target/lora_gateway.v1.$1"
}
call() { # METHOD JSON
  printf '\n$ %s %s\n' "$1" "$2"
  rpc "Inference/$1" "$2"
}

call GetModel '{}'
call Tokenize '{"text": "Ahoy there", "return_tokens": true}'

question='"chat": {"messages": [{"role": "user", "content": "Tell me about the sea."}]}'
sampling='"sampling": {"max_tokens": 16, "temperature": 0}'
call Generate "{$question, $sampling}"
call GenerateStream "{$question, $sampling}"
call GenerateStream "{\"adapter\": \"pirate\", $question, $sampling}"

# What trains here, and the newest job from its first event to its last: a watch replays
# what was, then follows, and ends with the job. Come back with the last "sequence" as
# after_sequence, and nothing is missed or told twice.
printf '\n$ Training/GetCapabilities\n'
rpc Training/GetCapabilities '{}'
newest=$(rpc Training/ListJobs '{"page_size": 1}' |
  sed -n '0,/"name":/s/.*"name": *"\([^"]*\)".*/\1/p')
if [[ -n $newest ]]; then
  printf '\n$ Training/WatchJob %s\n' "$newest"
  rpc Training/WatchJob "{\"name\": \"$newest\", \"after_sequence\": 0}"
fi

# Errors carry a code, a reason, and all that is wrong with the request at once.
# The exit status of buf is the code, times 8.
status=0
call Generate '{"text": "hi", "sampling": {"top_p": 3, "max_tokens": 0}}' || status=$?
if [[ $status -ne $((3 * 8)) ]]; then # 3: INVALID_ARGUMENT
  echo "expected INVALID_ARGUMENT" >&2
  exit 1
fi
