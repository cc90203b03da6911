# shellcheck shell=bash
# Sourced by the scripts beside it: messages, checks of arguments and tools, what is known of a certificate.
# Exit status of them all: 0 done, 1 failed, 2 wrong usage or a missing tool.

export LC_ALL=C # ranges in patterns, and dates, mean the same everywhere
readonly script=${0##*/}

note() {
    printf '%s: note: %s\n' "$script" "$1" >&2
}

fail() {
    printf '%s: error: %s\n' "$script" "$1" >&2
    exit "${2:-1}"
}

misuse() {
    fail "$1; $script -h tells more" 2
}

# need_value OPTION VALUE...: an option at the end of the line has none.
need_value() {
    [[ $# -ge 2 ]] || misuse "$1 wants a value"
}

need_tool() {
    type -P "$1" >/dev/null || fail "$1 is missing: $2" 2
}

need_file() {
    [[ -f $2 && -r $2 ]] || misuse "$1 is not a readable file: $2"
}

# need_match WHAT VALUE PATTERN: the whole value is of the form, a line break included in neither.
need_match() {
    [[ $2 =~ ^($3)$ && $2 != *$'\n'* ]] || misuse "$1 is $(printf %q "$2"), expected $3"
}

# PCR8 = SHA384(48 zero bytes || SHA384(certificate in DER)), as AWS's image format extends it.
pcr8_of() {
    {
        head -c 48 /dev/zero
        openssl x509 -in "$1" -outform DER | openssl dgst -sha384 -binary
    } | openssl dgst -sha384 -r | cut -d ' ' -f 1
}

# need_valid WHAT NOT_BEFORE NOT_AFTER: dates as openssl prints them; nitro-cli starts no image outside them.
need_valid() {
    local first last now
    first=$(date -d "$2" +%s) || fail "$1 is valid from an unreadable date: $2"
    last=$(date -d "$3" +%s) || fail "$1 is valid until an unreadable date: $3"
    now=$(date +%s)
    ((first <= now)) || fail "$1 is not valid before $2, it is $(date -u)"
    ((now < last)) || fail "$1 expired on $3, it is $(date -u)"
    ((now + 30 * 86400 < last)) || note "$1 expires on $3: nitro-cli will not start the image after that"
}
