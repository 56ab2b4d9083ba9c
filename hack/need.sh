#!/usr/bin/env bash
# need.sh COMMAND=PACKAGE... makes sure that commands are there: installs their Debian packages when it runs as root on
# a Debian, and says exactly what is missing otherwise. It always checks for a Go that can build this module.
set -euo pipefail
want=$(sed -n 's/^go \([0-9]*\.[0-9]*\).*/\1/p' "$(dirname "$0")/../go.mod")
if ! command -v go >/dev/null; then
	echo "The go command is missing: install Go $want or later (https://go.dev/doc/install) and put it on the PATH." >&2
	exit 1
fi
have=$(go env GOVERSION | sed 's/^go//')
if [ "$(printf '%s\n%s\n' "$want" "$have" | sort -V | head -n 1)" != "$want" ]; then
	echo "Go $have is too old: install Go $want or later." >&2
	exit 1
fi
missing=() packages=()
for pair in "$@"; do
	if ! command -v "${pair%%=*}" >/dev/null; then
		missing+=("${pair%%=*}")
		packages+=("${pair#*=}")
	fi
done
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
	echo "installing Debian packages: ${packages[*]}"
	apt-get update -q >/dev/null
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${packages[@]}" >/dev/null
else
	echo "missing: ${missing[*]}. Install the Debian packages ${packages[*]} (or what your system calls them)." >&2
	exit 1
fi
