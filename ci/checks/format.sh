#!/usr/bin/env bash
# The C sources are as clang-format leaves them. Checks, never rewrites.
set -u
cd "$(dirname "$0")/../.." || exit 1
files=$(find harness ref tests -name '*.[ch]' | sort)
[ -n "$files" ] || exit 1
clang-format --dry-run --Werror $files || exit 1
echo "format: $(echo "$files" | wc -l) files"
