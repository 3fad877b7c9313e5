#!/bin/sh
# The first process of a build's container, below its init. It runs one command text after another, each in a shell of its own.
#
# On stdin, one line each:
#   hello NONCE      answered by the mark "NONCE 0 ready"; the exported variables are left in CONTROL/0.env
#   run N SHELL [USER]   runs CONTROL/N.run.sh in SHELL, as USER where one is named, leaves its status in CONTROL/N.status, and
#                    answers "NONCE N STATUS", or "NONCE N noshell", "nouser" or "nosu" where the image has no SHELL, USER or su
#   term             ends every other process of the container with TERM
# A mark stands between two bytes 0x1e. stdout and stderr are one stream, so a mark comes after all that its command wrote.
# When stdin ends, the worker has gone: everything is ended.
#
# It needs a POSIX sh and nothing else, and must run under dash, busybox and bash. The reader of stdin and the runner of
# commands are the two ends of a pipeline, not a background job: POSIX makes a background job ignore INT and QUIT, and every
# command would inherit that. The traps keep TERM from ending the runner; a command's shell gets the default back.

control=${1:-/codebuild/output/tmp}
init=${2-}
first=$PPID

listen() {
    trap : HUP INT TERM USR1 USR2
    while IFS= read -r line; do
        case $line in
            term) signal TERM ;;
            *) printf '%s\n' "$line" ;;
        esac
    done
    signal TERM
    sleep 5
    signal KILL
}

# Every process that we may signal but the init, which the kernel spares, and this one. Outside a container that would be every
# process of the host, so it is done only right below an init. One that shares its namespace with others is named as the second
# argument, and does it itself.
signal() {
    if [ -n "$init" ]; then
        case $1 in
            TERM) kill -s USR1 "$init" ;;
            KILL) kill -s USR2 "$init" ;;
        esac
    elif [ "$first" = 1 ]; then
        kill -s "$1" -- -1
    fi
}

# The environment is kept whole for another user, HOME too; the file for the state is handed to it, as the folder is not.
as_user() {
    { : >"$control/$number.state" && chown "$user" "$control/$number.state"; } 2>/dev/null
    exec su -p -s /bin/sh "$user" -c "exec '$word' '$control/$number.run.sh'"
}

work() {
    trap : HUP INT TERM USR1 USR2
    while read -r verb number word user; do
        case $verb in
            hello)
                nonce=$number
                { { export -p; } >"$control/0.env"; } 2>/dev/null
                printf '\036%s 0 ready\036' "$nonce"
                ;;
            run)
                status=
                if ! command -v "$word" >/dev/null 2>&1; then
                    status=noshell
                elif [ -n "$user" ] && ! id -u "$user" >/dev/null 2>&1; then
                    status=nouser
                elif [ -n "$user" ] && ! command -v su >/dev/null 2>&1; then
                    status=nosu
                elif [ -n "$user" ]; then
                    { (as_user </dev/null 2>&1); } 2>/dev/null
                else
                    # The outer redirection hides this shell's own remark on a command that a signal ended.
                    { (exec "$word" "$control/$number.run.sh" </dev/null 2>&1); } 2>/dev/null
                fi
                ended=$?
                if [ -z "$status" ]; then
                    status=$ended
                    { { printf '%s\n' "$status"; } >"$control/$number.status"; } 2>/dev/null
                fi
                printf '\036%s %s %s\036' "$nonce" "$number" "$status"
                ;;
        esac
    done
}

exec 2>&1
trap : HUP INT TERM USR1 USR2
PATH=$PATH:${0%/*}/bin
export PATH
cd /
listen | work
