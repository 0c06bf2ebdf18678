#!/bin/bash -p
# Says whether this host is ready for the local CA. It changes nothing, signs nothing and logs in nowhere. `--help` tells
# how to use it.
#
# How key material stays where it is: no part of the key file is ever read into a variable, an argument, a here-string
# or a file, or sent through a pipe. Only ssh-keygen, grep and wc open it; the first answers with the public half, the
# others with numbers of lines.
# Where the merged configuration or another foreign text is handled (it may hold other secrets), tracing is off:
# `local -; set +x` at the top of a function says so, and such texts travel in globals, as arguments are traced.
#
# It is one file, so that it can be copied to a host and read there as a whole before root runs it.
#
# One line for each check. CATALOGUE holds every code that can stand there, its status, and what to do next.
[ -n "${BASH_VERSION:-}" ] || { echo "preflight: error: this needs bash" >&2; exit 2; }
# Nothing of the caller's environment steers it: -p takes no functions, BASH_ENV, CDPATH or SHELLOPTS from there.
if [[ $- != *p* && ${BASH_SOURCE[0]:-} == "$0" ]]; then builtin exec /bin/bash -p -- "$0" "$@"; fi
set -u -f -o pipefail
unset -v IFS POSIXLY_CORRECT SSH_ASKPASS DISPLAY WAYLAND_DISPLAY
export LC_ALL=C
export PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin${PATH:+:$PATH}"
umask 077

readonly KEY_VARIABLE=PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_FILE
readonly FOLDER_VARIABLE=PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR
readonly AGENT_VARIABLE=PLATFORM_RUNTIME_SAFE_SESSION_CA_AGENT_DIR
# VARIABLE says where the key is, MOUNTED_VARIABLE is what the overlay needs: with an ssh-agent there is no file, and of
# a file the folder is mounted.
if [ -n "${!AGENT_VARIABLE:-}" ]; then
    readonly VARIABLE=$AGENT_VARIABLE MOUNTED_VARIABLE=$AGENT_VARIABLE key_source=agent
else
    readonly VARIABLE=$KEY_VARIABLE MOUNTED_VARIABLE=$FOLDER_VARIABLE key_source=file
fi
readonly PIN=SAFE_SESSION_CA_FINGERPRINT
readonly SERVICE=safe-session-api
readonly PATIENCE=10 # seconds for a program that is asked something
readonly MAX_KEY_FILE=16384 MIN_RSA_BITS=3072
readonly SEP=$'\x1f' # between the parts of a place in the merged configuration
readonly DEFAULT_TARGET=/run/signer-ca/ca # where the service looks for its key unless it is told otherwise
readonly DEFAULT_SOCKET=/run/signer-agent/agent.sock # and for its ssh-agent
readonly KEEPER_UID=8221 # the keeper's user in the image
readonly LOGIN_USER=${SAFE_SESSION_LOGIN_USER:-llmops}
readonly LOGIN_FROM=${SAFE_SESSION_LOGIN_FROM:-127.0.0.1}
readonly PRINCIPALS=,${SAFE_SESSION_PRINCIPALS:-$LOGIN_USER},
readonly USER_ALGORITHM=ssh-ed25519-cert-v01@openssh.com # of the keys that safe-session makes
readonly CONTAINER_CHECKS=(container_mode container_user container_capabilities container_root_read_only
    container_mounts)
# Where engines and the service have their sockets, and what no container has to see of its host.
readonly SOCKETS=(/run/podman /run/docker /run/docker.sock /run/containerd /run/crio /run/libpod /run/user /run/signer
    /run/signer-api /run/signer-agent)
readonly STORES=(/var/lib/containers /var/lib/docker)
readonly HOST_ONLY=(/boot /dev /proc /sys)
# Who may write here can become root at the next minute, login or start.
readonly HOST_WRITABLE_BY_ROOT=(/bin /etc/cron.d /etc/cron.daily /etc/cron.hourly /etc/cron.monthly /etc/cron.weekly
    /etc/crontab /etc/ld.so.preload /etc/pam.d /etc/passwd /etc/profile.d /etc/ssh /etc/sudoers.d /etc/systemd /lib
    /lib64 /root /run/systemd /sbin /usr /var/spool/cron)

readonly CATALOGUE=(
    # status, code, next action
    "ok   ca_key_path"
    "FAIL ca_key_variable_not_set           set $VARIABLE to the path of the rendered key"
    "FAIL ca_key_path_not_absolute          give $VARIABLE the whole path, from / on"
    "FAIL ca_key_path_not_plain             write the path without //, ., .. and a / at its end"
    "ok   ca_key_present"
    "FAIL ca_key_missing                    render the key first: signer ca render --to FILE"
    "FAIL ca_key_not_a_regular_file         render it to a file; if a container engine made a folder there, remove that"
    "FAIL ca_key_has_links                  render it afresh, with one link, and find out who made the other"
    "FAIL ca_key_empty                      render the key again"
    "FAIL ca_key_too_large                  render one OpenSSH private key and nothing else"
    "ok   ca_key_no_link"
    "FAIL ca_key_is_a_link                  name the file itself"
    "FAIL ca_key_parent_is_a_link           name the path that realpath prints"
    "ok   ca_key_owner"
    "FAIL ca_key_owner_must_be_root:root    chown root:root the file, or fix the render job"
    "ok   ca_key_mode"
    "FAIL ca_key_mode_must_be_0400_or_0600  chmod 0400 the rendered file, or fix the mode in the render job"
    "ok   ca_key_no_acl"
    "FAIL ca_key_has_acl                    setfacl -b the file, or render it afresh"
    "ok   ca_key_parents"
    "FAIL ca_key_parent_owner_must_be_root  chown root the folder, or render the key elsewhere"
    "FAIL ca_key_parent_writable_by_others  chmod go-w the folder, or render the key elsewhere"
    "ok   ca_key_folder"
    "FAIL ca_key_folder_differs             unset $FOLDER_VARIABLE, or set it to the folder of the key file"
    "FAIL ca_key_folder_holds_more          render the key into a folder of its own: the container sees all that is in it"
    "ok   ca_key_in_memory"
    "warn ca_key_on_disk"
    "ok   ca_key_outside_git"
    "FAIL ca_key_in_git_work_tree           render it elsewhere; if it was ever committed, make a new key"
    "ok   ca_key_parses"
    "FAIL ca_key_malformed                  render it again with signer ca render, or write it with ssh-keygen"
    "FAIL ca_key_several                    keep the pinned key in that file and nothing else"
    "FAIL ca_key_not_a_private_key          it must be an OpenSSH private key as ssh-keygen writes it; render it again"
    "FAIL ca_key_has_passphrase             store the key without one in Infisical, and render it again"
    "ok   ca_agent_socket"
    "FAIL ca_agent_missing                  start signer-agent.service; it listens in the folder that $AGENT_VARIABLE names"
    "ok   ca_agent_user"
    "FAIL ca_agent_user_differs             run it as root or as user $KEEPER_UID, the keeper's in the image"
    "ok   ca_agent_private"
    "FAIL ca_agent_not_private              chmod 0700 the folder, and 0600 the socket in it"
    "ok   ca_agent_key"
    "FAIL ca_agent_not_answering            start it again, and look at its log"
    "FAIL ca_agent_pin_not_set              set $PIN: the pin alone says which of its keys is the CA's"
    "FAIL ca_agent_key_missing              give the pinned key to the agent: ssh-add FILE, or ssh-add -s PROVIDER"
    "ok   ca_key_kind"
    "FAIL ca_key_kind_not_allowed           make a new key: signer ca new"
    "FAIL ca_key_rsa_too_short              make a new key: signer ca new"
    "ok   ca_key_fingerprint"
    "FAIL ca_key_fingerprint_differs        render the pinned key, or correct $PIN"
    "ok   ca_key_no_login_key"
    "FAIL ca_key_is_a_login_key             take it out of that file: a CA key must not log in itself"
    "ok   compose_found"
    "FAIL compose_missing                   install docker or podman compose, or name one in PLATFORM_RUNTIME_COMPOSE"
    "FAIL compose_too_old                   install podman-compose 1.3 or later (pip), or docker compose v2"
    "FAIL engine_missing                    install docker or podman, or name one in PLATFORM_RUNTIME_ENGINE"
    "FAIL engine_not_answering              start the engine, then run this again"
    "ok   compose_files"
    "FAIL compose_base_missing              name it with --base"
    "FAIL compose_overlay_missing           name it with --overlay"
    "ok   compose_merged"
    "FAIL compose_merge_failed              run the compose command with both -f FILE and config; it says why"
    "FAIL compose_config_not_understood     compare the compose command's version with the runbook's"
    "FAIL compose_service_missing           the merged files must define $SERVICE; check --base and --overlay"
    "ok   compose_allowed"
    "FAIL compose_allow_list_missing        name it with --allow-list; it lies beside the overlays of this repository"
    "FAIL compose_not_allowed               take it out of the compose files; the allow-list beside the overlays says what may stay"
    "FAIL compose_steered                   take it out: it changes what compose does, and no compose file shows it"
    "ok   compose_other_services"
    "FAIL compose_other_service_not_named   name it in compose.other_services of cutover.toml, or move it to another project"
    "FAIL compose_other_service_not_allowed  move it to another project, or take that away from it"
    "FAIL compose_other_service_reaches     take that volume away from it, or move what it reaches"
    "ok   overlay_mount"
    "FAIL overlay_mount_missing             mount \${$MOUNTED_VARIABLE:?} in the overlay"
    "FAIL overlay_mount_not_read_only       set read_only: true in the overlay"
    "FAIL overlay_mount_twice               keep the overlay's mount and remove the other"
    "FAIL overlay_key_reached_by_writable_mount  mount less, or mount it read-only, or render the key elsewhere"
    "FAIL overlay_key_reached_by_other_service   only $SERVICE may see the key; take that mount away"
    "FAIL overlay_mount_may_be_created      set bind: {create_host_path: false} in the overlay"
    "FAIL overlay_mount_target_differs      let SIGNER_CA_KEY_FILE name the key in the target of the mount"
    "ok   overlay_mode"
    "FAIL overlay_mode_must_be_local        set SIGNER_MODE: local in the overlay"
    "FAIL overlay_key_source_differs        set SIGNER_CA_KEY_SOURCE as the overlays of this repository do"
    "ok   overlay_needs_variable"
    "FAIL overlay_merges_without_variable   write \${$MOUNTED_VARIABLE:?message} in the overlay, and set no default in .env"
    "FAIL overlay_stops_for_another_reason  write \${$MOUNTED_VARIABLE:?message} in the overlay"
    "ok   service_hardened"
    "FAIL service_not_hardened              restore what the base file of this repository says"
    "ok   image_present"
    "FAIL image_missing                     build or load the image before the cutover"
    "warn container_not_running"
    "ok   container_mode"
    "FAIL container_mode_unexpected         find out who started it, and how"
    "ok   container_user"
    "FAIL container_user_differs            start it again from the compose files"
    "ok   container_capabilities"
    "FAIL container_capabilities_differ     start it again from the compose files"
    "ok   container_root_read_only"
    "FAIL container_root_writable           start it again from the compose files"
    "ok   container_mounts"
    "FAIL container_can_write_key           stop mounting that path, and start it again"
    "ok   clock_synchronised"
    "warn clock_not_synchronised"
    "warn clock_unknown"
    "warn sshd_elsewhere"
    "ok   sshd_config"
    "FAIL sshd_config_unreadable            run sshd -T; it says why"
    "ok   sshd_trusts_ca"
    "FAIL sshd_does_not_trust_ca            add the public key of this CA to the file that TrustedUserCAKeys names"
    "FAIL sshd_ca_file_unsafe               root must own the file and all folders above it, and nobody else may write"
    "FAIL sshd_ca_line_malformed            write each line as signer ca bundle prints it: kind, blank, key, no options"
    "FAIL sshd_ca_algorithm_refused         add that algorithm to CASignatureAlgorithms"
    "FAIL sshd_ca_revoked                   make a new CA key, or take this one off the list that RevokedKeys names"
    "ok   sshd_accepts_login"
    "FAIL sshd_refuses_keys                 set PubkeyAuthentication yes for the login user"
    "FAIL sshd_refuses_key_kind             add $USER_ALGORITHM to PubkeyAcceptedAlgorithms"
    "FAIL sshd_requires_more_than_a_key     add publickey by itself to AuthenticationMethods of the login user"
    "FAIL sshd_refuses_user                 change that setting, so that the login user may log in"
    "FAIL sshd_account_unusable             create the account, unlock it, and give it a login shell that exists"
    "FAIL sshd_revocation_list_unusable     make an empty list there: ssh-keygen -k -f FILE"
    "warn sshd_login_not_proved"
    "ok   principals_file"
    "FAIL principals_file_unsafe            root must own the file and all folders above it, and nobody else may write"
    "FAIL principals_file_missing           create it, with the principal of the certificates on a line"
    "FAIL principals_file_lacks_principal   add the principal of the certificates on a line"
)

usage() {
    cat <<HELP
usage: sudo $KEY_VARIABLE=FILE \\
         bash ${0##*/} [options]
       sudo $AGENT_VARIABLE=DIR \\
         $PIN=SHA256:... \\
         bash ${0##*/} [options]

Says whether this host is ready for the local CA. Reads
only; run it as root on the host.

  --base FILE
      compose file of the service (default:
      overlays/safe-session.yaml of this repository)
  --overlay FILE
      compose file with the local CA (default:
      overlays/safe-session-local-ca.yaml, with an agent
      overlays/safe-session-agent.yaml)
  --allow-list FILE
      what compose files may hold (default:
      overlays/allow-list.txt of this repository)
  --other-service NAME
      another service that the compose files may define; may
      be given more than once
  --expect-mode MODE
      mode the running container must be in: vault, shadow
      or local (default: any)
  --sshd-elsewhere
      the hosts that trust the CA are others; do not look at
      this host's sshd
  --json
      the same as one JSON object
  --codes
      list all codes that a check can give, and stop
  --help
      this text

environment:
  $KEY_VARIABLE
      the rendered CA key
  $FOLDER_VARIABLE
      its folder, which the container mounts (default: the
      folder of that file)
  $AGENT_VARIABLE
      instead of it: the folder with agent.sock, the socket
      of an ssh-agent that holds the key
  $PIN
      fingerprint it must have (SHA256:...), if set; an
      agent needs it
  SAFE_SESSION_LOGIN_USER
      account that sshd -T is asked about (default: llmops)
  SAFE_SESSION_LOGIN_FROM
      address from which it logs in (default: 127.0.0.1)
  SAFE_SESSION_PRINCIPALS
      principals of its certificates, with commas (default:
      the account's name)
  PLATFORM_RUNTIME_COMPOSE
      compose command (default: docker compose, podman
      compose or podman-compose)
  PLATFORM_RUNTIME_ENGINE
      container engine (default: the one that the compose
      command drives)

One line for each check: ok, warn, FAIL or skip, a code, a
detail; after a FAIL the next action. skip: could not be
checked, because of what another line says.
exit status: 0 ready, 1 not ready, 2 wrong use
HELP
}

wrong_use() {
    printf 'preflight: error: %s\npreflight: hint: %s\n' "$1" "$2" >&2
    exit 2
}

base="" overlay="" allow_list="" expected_mode="" sshd_elsewhere="" json="" expected_user=""
named_services=()

# --- telling ----------------------------------------------------------------------------------------------------

declare -A status_of=() next_of=() count=([ok]=0 [warn]=0 [FAIL]=0 [skip]=0)
codes=() results=()

load_catalogue() {
    local - line rest code
    set +x
    for line in "${CATALOGUE[@]}"; do
        rest=${line:5}
        code=${rest%% *}
        codes+=("$code")
        status_of[$code]=${line%% *}
        rest=${rest#"$code"}
        next_of[$code]=${rest#"${rest%%[! ]*}"}
    done
}

# Sets `shown` to a text that neither steers a terminal nor breaks a line, whatever bytes were in it.
show() {
    shown=$1
    if [[ $shown == *[!\ -~]* ]]; then printf -v shown '%q' "$1"; fi
}

# say CODE DETAIL
say() { tell "${status_of[$1]}" "$1" "$2" "${next_of[$1]}"; }

# skip WHY CODE...: for checks that cannot be made.
skip() {
    local code why=$1
    shift
    for code; do tell skip "$code" "$why" ""; done
}

tell() {
    local status=$1 code=$2 detail next=$4 shown line
    show "$3"
    detail=$shown
    count[$status]=$((count[$status] + 1))
    if [ -n "$json" ]; then
        detail=${detail//\\/\\\\}
        printf -v line '{"status": "%s", "code": "%s", "detail": "%s", "next": "%s"}' \
            "$status" "$code" "${detail//\"/\\\"}" "${next//\"/\\\"}"
        results+=("$line")
        return
    fi
    printf '%-6s%-24s   %s\n' "$status" "$code" "$detail"
    if [ "$status" = FAIL ]; then printf '      %s\n' "$next"; fi
}

# Prints the last line, or everything with --json. Fails if the host is not ready.
tell_summary() {
    local text="ready: " ready=true checks
    if ((count[FAIL] > 0)); then
        ready=false
        text="not ready: ${count[FAIL]} failed, "
    fi
    if ((count[warn] == 1)); then text+="1 warning, "; fi
    if ((count[warn] > 1)); then text+="${count[warn]} warnings, "; fi
    text+="${count[ok]} ok"
    if ((count[skip] > 0)); then text+=", ${count[skip]} skipped"; fi
    if [ -z "$json" ]; then
        printf '%s\n' "$text"
    else
        printf -v checks '  %s,\n' "${results[@]}"
        printf '{\n "ready": %s,\n "failed": %d,\n "warnings": %d,\n "ok": %d,\n "skipped": %d,\n' \
            "$ready" "${count[FAIL]}" "${count[warn]}" "${count[ok]}" "${count[skip]}"
        printf ' "summary": "%s",\n "checks": [\n%s\n ]\n}\n' "$text" "${checks%,*}"
    fi || exit 1
    [ "$ready" = true ]
}

# --- files ------------------------------------------------------------------------------------------------------

# Sets `above` to all folders above an absolute path, from / on.
find_above() {
    local path=$1
    above=()
    while [[ $path == */* && $path != / ]]; do
        path=${path%/*}
        path=${path:-/}
        above=("$path" "${above[@]}")
    done
}

# Sets `uids`, `gids`, `modes`, `links`, `sizes` and `kinds`, one entry for each path; links are not followed.
stat_all() {
    local fields=() at
    uids=() gids=() modes=() links=() sizes=() kinds=()
    mapfile -t -d '' fields < <(stat --printf '%u\0%g\0%a\0%h\0%s\0%F\0' -- "$@" 2>/dev/null)
    for ((at = 0; at < ${#fields[@]}; at += 6)); do
        uids+=("${fields[at]}") gids+=("${fields[at + 1]}") modes+=("${fields[at + 2]}")
        links+=("${fields[at + 3]}") sizes+=("${fields[at + 4]}") kinds+=("${fields[at + 5]}")
    done
    ((${#uids[@]} == $#))
}

# find_unsafe PATH...: sets `fault` (owner, writable, link, unreadable) and `fault_at` to the first path that somebody
# other than root owns or may write; fails if there is none.
find_unsafe() {
    local index
    fault_at=$1 fault=unreadable
    stat_all "$@" || return 0
    for index in "${!uids[@]}"; do
        fault_at=${*:index+1:1}
        if [ "${uids[index]}" != 0 ]; then
            fault=owner
            return 0
        fi
        # A link has no mode of its own; who may replace it is said by the folder it lies in.
        if ((0${modes[index]} & 022)) && [ "${kinds[index]}" != "symbolic link" ]; then
            fault=writable
            return 0
        fi
    done
    fault="" fault_at=""
    return 1
}

# --- the key ----------------------------------------------------------------------------------------------------

key=""      # its path, if that can be one; the agent's socket, if the key is in an agent
mounted=""  # what the overlay mounts: the folder of the key, or of the agent's socket
is_file=""  # yes: there is a regular file, and no link
key_owner="" key_mode="" key_size=0
public=""   # its public half, as ssh-keygen prints it
blob=""     # the base64 in that
print=""    # its fingerprint
readonly NO_FILE="no key file to look at" NO_KEY="no key could be read"

check_key_path() {
    local path=${!VARIABLE:-}
    if [ -z "$path" ]; then
        say ca_key_variable_not_set "$VARIABLE is ${!VARIABLE+empty}${!VARIABLE-not set}"
    elif [[ $path != /* ]]; then
        say ca_key_path_not_absolute "$path"
    elif [[ $path/ == *//* || $path/ == */./* || $path/ == */../* ]]; then
        say ca_key_path_not_plain "$path"
    else
        if [ "$key_source" = agent ]; then
            mounted=$path key=${path%/}/agent.sock
        else
            mounted=${path%/*} key=$path
            mounted=${mounted:-/}
            if [ -z "${!FOLDER_VARIABLE:-}" ]; then export "$FOLDER_VARIABLE=$mounted"; fi # for compose
        fi
        say ca_key_path "$key"
    fi
}

check_key_links() {
    local folder found=""
    if [ -z "$key" ]; then
        skip "$NO_FILE" ca_key_no_link
        return
    fi
    find_above "$key"
    for folder in "${above[@]}"; do
        if [ -L "$folder" ]; then
            found=yes
            say ca_key_parent_is_a_link "$folder"
        fi
    done
    if [ -L "$key" ]; then
        say ca_key_is_a_link "it points elsewhere"
    elif [ -z "$found" ]; then
        say ca_key_no_link "in the whole path"
    fi
}

check_key_file() {
    local failed=${count[FAIL]}
    if [ -z "$key" ] || [ -L "$key" ]; then
        skip "$NO_FILE" ca_key_present
    elif [ ! -e "$key" ] || ! stat_all "$key"; then
        say ca_key_missing "there is no file"
    elif [ ! -f "$key" ]; then
        say ca_key_not_a_regular_file "it is a ${kinds[0]}"
    else
        is_file=yes
        key_owner=${uids[0]}:${gids[0]} key_mode=${modes[0]} key_size=${sizes[0]}
        if [ "${links[0]}" != 1 ]; then say ca_key_has_links "it has ${links[0]} hard links"; fi
        if ((key_size == 0)); then say ca_key_empty "it has 0 bytes"; fi
        if ((key_size > MAX_KEY_FILE)); then
            say ca_key_too_large "it has $key_size bytes, a key has at most $MAX_KEY_FILE"
        fi
        if ((count[FAIL] == failed)); then say ca_key_present "regular file, 1 link, $key_size bytes"; fi
    fi
}

# The rights of the file itself.
check_key_rights() {
    local listed
    if [ -z "$is_file" ]; then
        skip "$NO_FILE" ca_key_owner ca_key_mode ca_key_no_acl
        return
    fi
    if [ "$key_owner" = 0:0 ]; then
        say ca_key_owner "root:root"
    else
        say ca_key_owner_must_be_root:root "it is $key_owner"
    fi
    case $key_mode in
        400 | 600) say ca_key_mode "0$key_mode" ;;
        *) say ca_key_mode_must_be_0400_or_0600 "it is $(printf '%04o' "0$key_mode")" ;;
    esac
    listed=$(ls -ld -- "$key" 2>/dev/null)
    case $listed in
        ??????????+*) say ca_key_has_acl "an access control list lets others in" ;;
        ??????????*) say ca_key_no_acl "no access control list" ;;
        *) say ca_key_has_acl "ls does not tell" ;;
    esac
}

# Where the file lies: who could replace it, and what else has a copy.
check_key_place() {
    local folder kind
    if [ -z "$is_file" ]; then
        skip "$NO_FILE" ca_key_parents ca_key_folder ca_key_in_memory ca_key_outside_git
        return
    fi
    if ! find_unsafe "${above[@]}"; then
        say ca_key_parents "root's, and writable by nobody else"
    elif [ "$fault" = writable ]; then
        say ca_key_parent_writable_by_others "$fault_at"
    else
        say ca_key_parent_owner_must_be_root "$fault_at"
    fi
    check_key_folder
    kind=$(stat -f -c %T -- "$key" 2>/dev/null)
    case $kind in
        tmpfs | ramfs) say ca_key_in_memory "$kind" ;;
        *) say ca_key_on_disk "${kind:-unknown file system}; render it to a tmpfs" ;;
    esac
    for folder in "${above[@]}"; do
        if [ -e "${folder%/}/.git" ] || [ -L "${folder%/}/.git" ]; then
            say ca_key_in_git_work_tree "$folder"
            return
        fi
    done
    say ca_key_outside_git "no work tree around it"
}

# The container sees the whole folder: nothing but the key may be in it, its public half and what `signer ca render`
# writes for a moment.
check_key_folder() {
    local name named=${!FOLDER_VARIABLE:-} others=()
    if [ "$named" != "$mounted" ]; then
        say ca_key_folder_differs "$FOLDER_VARIABLE is $named, the key is in $mounted"
        return
    fi
    while IFS= read -r -d '' name; do
        case $name in
            "${key##*/}" | "${key##*/}.pub" | ".${key##*/}.new") ;;
            *) others+=("$name") ;;
        esac
    done < <(set +f && shopt -s nullglob dotglob && cd -- "$mounted" && printf '%s\0' *)
    if [ ${#others[@]} -gt 0 ]; then
        say ca_key_folder_holds_more "$mounted: ${others[0]}, ${#others[@]} in all"
    else
        say ca_key_folder "$mounted, nothing else in it"
    fi
}

# --- the agent --------------------------------------------------------------------------------------------------

readonly NO_AGENT="no ssh-agent to look at"

check_agent() {
    local folder_mode
    if [ -z "$key" ] || [ -L "$key" ]; then
        skip "$NO_AGENT" ca_agent_socket
    elif [ ! -S "$key" ] || ! stat_all "$mounted" "$key"; then
        say ca_agent_missing "there is no socket $key"
    else
        is_file=yes
        say ca_agent_socket "there is no key file: the key is in an ssh-agent"
    fi
    if [ -z "$is_file" ]; then
        skip "$NO_AGENT" ca_agent_user ca_agent_private ca_key_parents ca_agent_key ca_key_kind ca_key_fingerprint
        return
    fi
    key_owner=${uids[1]} key_mode=${modes[1]} folder_mode=${modes[0]}
    if [ "$key_owner" = 0 ] || [ "$key_owner" = $KEEPER_UID ]; then
        say ca_agent_user "$key_owner"
    else
        say ca_agent_user_differs "it runs as user $key_owner"
    fi
    if [ "${uids[0]}" != 0 ] && [ "${uids[0]}" != "$key_owner" ]; then
        say ca_agent_not_private "the folder belongs to user ${uids[0]}"
    elif ((0$folder_mode & 077 || 0$key_mode & 077)); then
        printf -v folder_mode 'folder %04o, socket %04o' "0$folder_mode" "0$key_mode"
        say ca_agent_not_private "$folder_mode"
    else
        say ca_agent_private "folder and socket are closed to others"
    fi
    find_above "$mounted"
    if ! find_unsafe "${above[@]}"; then
        say ca_key_parents "root's, and writable by nobody else"
    elif [ "$fault" = writable ]; then
        say ca_key_parent_writable_by_others "$fault_at"
    else
        say ca_key_parent_owner_must_be_root "$fault_at"
    fi
    ask_agent
}

# Prints the keys of the agent, which signs nothing here; root is a user that every agent serves.
list_agent() { SSH_AUTH_SOCK=$key timeout "$PATIENCE" ssh-add -L </dev/null 2>/dev/null; }

ask_agent() {
    local listed=() line kind="" bits=0 status
    mapfile -t listed < <(list_agent; printf 'exit %d\n' $?)
    status=${listed[-1]#exit }
    unset -v 'listed[-1]'
    if ((status > 1)); then
        say ca_agent_not_answering "ssh-add -L ends with $status"
    elif [ -z "${!PIN:-}" ]; then
        say ca_agent_pin_not_set "it holds ${#listed[@]} keys, $PIN is ${!PIN+empty}${!PIN-not set}"
    else
        for line in "${listed[@]}"; do
            public=$line
            read_public
            if [ "$print" = "${!PIN}" ]; then
                say ca_agent_key "$kind $print, as pinned"
                check_key_kind
                return
            fi
        done
        say ca_agent_key_missing "none of its ${#listed[@]} keys is ${!PIN}"
    fi
    public="" blob="" print=""
    skip "$NO_KEY" ca_key_kind ca_key_fingerprint
}

# --- its content --------------------------------------------------------------------------------------------------

# The one place that has the key file read. ssh-keygen refuses a file that others may read, so nothing is parsed then.
check_key_content() {
    local why=$NO_KEY problem kind="" bits=0
    if [ -z "$is_file" ] || ((key_size == 0 || key_size > MAX_KEY_FILE)); then
        why=$NO_FILE
    elif [[ $key_owner == 0:* ]] && ((0$key_mode & 077)); then
        why="ssh-keygen reads no key that others may read"
    elif find_form_fault; then
        say "$fault" "$fault_at"
    elif public=$(ssh-keygen -y -P '' -f "$key" </dev/null 2>/dev/null); then
        read_public
        say ca_key_parses "$kind $print, no passphrase"
        check_key_kind
        return
    else
        public=""
        problem=$(ssh-keygen -y -P '' -f "$key" 2>&1 >/dev/null </dev/null)
        if [[ $problem == *passphrase* ]]; then
            say ca_key_has_passphrase "ssh-keygen needs one to read it"
        else
            say ca_key_not_a_private_key "ssh-keygen cannot read it"
        fi
    fi
    if [ "$why" != "$NO_KEY" ]; then skip "$why" ca_key_parses; fi
    skip "$NO_KEY" ca_key_kind ca_key_fingerprint
}

# Sets `fault`, a code, and `fault_at` unless the key file has the one form that ssh-keygen reads whole and the keeper
# takes; ssh-keygen by itself reads older forms too, and of two keys the first. Fails if there is no fault.
find_form_fault() {
    local begins newlines
    newlines=$(wc -l -- "$key" 2>/dev/null)
    begins=$(count_lines -E '^-{5}BEGIN ([A-Z0-9]+ )?PRIVATE KEY-{5}')
    fault=ca_key_malformed fault_at=""
    if [[ ${begins:-0} -gt 1 ]]; then
        fault=ca_key_several fault_at="it holds $begins private keys"
    elif [ "$(count_lines -E '^-{5}BEGIN OPENSSH PRIVATE KEY-{5}')" != 1 ]; then
        fault=ca_key_not_a_private_key fault_at="it does not begin as ssh-keygen's private keys do"
    elif [ "$(count_lines $'\r')" != 0 ]; then
        fault_at="it has line ends of Windows (CRLF)"
    elif [ "$(count_lines '')" != "${newlines%% *}" ]; then
        fault_at="it has no newline at its end"
    elif [ "$(count_lines -v -x -E '[A-Za-z0-9+/]+={0,2}')" != 2 ] ||
        [ "$(count_lines -x -E -e '-{5}BEGIN OPENSSH PRIVATE KEY-{5}' '-{5}END OPENSSH PRIVATE KEY-{5}')" != 2 ]; then
        fault_at="it has other text before, in or after the key"
    else
        fault=""
    fi
    [ -n "$fault" ]
}

# Prints how many lines of the key file a pattern finds.
count_lines() { grep -a -c "${@:1:$#-1}" -e "${!#}" -- "$key" 2>/dev/null; }

# From `public`: sets `blob`, `print`, `bits` and `kind`. The comment goes no further, whatever somebody wrote in it.
read_public() {
    local name=${public%% *} told rest
    rest=${public#* }
    blob=${rest%% *}
    told=$(printf '%s %s\n' "$name" "$blob" | ssh-keygen -l -E sha256 -f - 2>/dev/null)
    bits=${told%% *}
    rest=${told#* }
    print=${rest%% *}
    kind=${told##*\(}
    kind=${kind%\)}
}

check_key_kind() {
    case $kind in
        RSA)
            if ((bits < MIN_RSA_BITS)); then
                say ca_key_rsa_too_short "it has $bits bits, RSA needs $MIN_RSA_BITS"
            else
                say ca_key_kind "RSA, $bits bits"
            fi
            ;;
        ED25519 | ECDSA) say ca_key_kind "$kind, $bits bits" ;;
        *) say ca_key_kind_not_allowed "it is $kind; a CA key is ed25519, ecdsa or rsa" ;;
    esac
    if [ -z "${!PIN+set}" ]; then
        say ca_key_fingerprint "$print, $PIN is not set"
    elif [ "${!PIN}" = "$print" ]; then
        say ca_key_fingerprint "$print, as pinned"
    else
        say ca_key_fingerprint_differs "the key is $print, $PIN is ${!PIN:-empty}"
    fi
}

# --- accounts ---------------------------------------------------------------------------------------------------

# expand_for_accounts PATTERN...: adds to `expanded` the files that exist where these patterns of sshd_config (%h, %u,
# %U, %%; relative ones are below the home) point for any account of this host.
expand_for_accounts() {
    local pattern path
    for pattern; do
        while IFS= read -r path; do
            if [ -e "$path" ] || [ -L "$path" ]; then expanded[$path]=1; fi
        done < <(expand_for "$pattern" </etc/passwd)
    done
}

# expand_for PATTERN: prints the path for each account of the lines of passwd(5) that it reads.
expand_for() {
    local name uid home path _
    while IFS=: read -r name _ uid _ _ home _; do
        path=${1//%%/$SEP}
        path=${path//%h/"$home"}
        path=${path//%u/"$name"}
        path=${path//%U/"$uid"}
        path=${path//$SEP/%}
        if [[ $path != /* ]]; then path=${home%/}/$path; fi
        printf '%s\n' "$path"
    done
}

# Fails unless a line of the file holds the CA's public half. Lines may hold options with secrets in them.
holds_public() {
    local - line
    set +x
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line//$'\t'/ }
        line=${line#"${line%%[! ]*}"}
        if [[ $line != '#'* && " $line " == *" $blob "* ]]; then return 0; fi
    done 2>/dev/null <"$1"
    return 1
}

check_login_keys() {
    local path
    local -A expanded=()
    if [ -z "$blob" ]; then
        skip "$NO_KEY" ca_key_no_login_key
        return
    fi
    expand_for_accounts .ssh/authorized_keys .ssh/authorized_keys2 "${authorized_keys[@]}"
    for path in "${!expanded[@]}"; do
        if [ -f "$path" ] && holds_public "$path"; then
            say ca_key_is_a_login_key "$path"
            return
        fi
    done
    say ca_key_no_login_key "in none of ${#expanded[@]} authorized_keys files"
}

# --- sshd -------------------------------------------------------------------------------------------------------

authorized_keys=()    # patterns
sshd_state=""         # config, none, elsewhere, unreadable
declare -A sshd=()    # what sshd -T says, by keyword; values of a keyword that came more than once have a blank between
sshd_addresses=""     # criteria of a Match block that asks for an address, if there is one

start_sshd_test() {
    local program connection="user=$LOGIN_USER,host=$LOGIN_FROM,addr=$LOGIN_FROM"
    program=$(type -P sshd)
    if [ -n "$sshd_elsewhere" ]; then
        sshd_state=elsewhere
    elif [ -z "$program" ]; then
        sshd_state=none
    else
        exec {sshd_output}< <(run_to_end "$program" -T -C "$connection")
        exec {sshd_matches}< <(timeout "$PATIENCE" "$program" -T -ddd -C "$connection" 2>&1 1>/dev/null </dev/null)
    fi
}

read_sshd_test() {
    local - lines=() line
    set +x
    if [ -n "$sshd_state" ]; then return; fi
    mapfile -t lines <&"$sshd_output"
    sshd_state=config
    for line in "${lines[@]}"; do
        if [ -z "$line" ]; then continue; fi
        sshd[${line%% *}]+="${sshd[${line%% *}]:+ }${line#* }"
    done
    IFS=' ' read -r -a authorized_keys < <(printf '%s\n' "${sshd[authorizedkeysfile]:-}")
    if [ "${lines[-1]}" != "exit 0" ]; then sshd_state=unreadable; fi
    while IFS= read -r line; do
        line=${line,,}
        if [[ $line == *"checking match for '"* ]]; then
            line=" ${line#*"checking match for '"}"
            line=${line%%"' user "*}
            if [[ $line =~ [[:space:]](address|host|localaddress|localport|rdomain)[[:space:]=] ]]; then
                sshd_addresses=${line# }
            fi
        fi
    done <&"$sshd_matches"
}

check_sshd() {
    case $sshd_state in
        elsewhere) say sshd_elsewhere "the hosts that trust the CA are to be looked at by themselves" ;;
        none) say sshd_elsewhere "no sshd on this host; look at those that trust the CA" ;;
        unreadable) say sshd_config_unreadable "sshd -T fails" ;;
        config)
            say sshd_config "sshd -T for user $LOGIN_USER from $LOGIN_FROM"
            check_sshd_ca
            check_sshd_login
            check_principals
            return
            ;;
    esac
    skip "no sshd to look at" sshd_trusts_ca sshd_accepts_login principals_file
}

# scan_keys FILE: reads a file of public keys as sshd does, which stops at the first line that it cannot read. Sets
# `holds` (yes: a line before that is the CA's public half) and `bad_line` (its number, 0: there is none).
scan_keys() {
    local - line name rest number=0
    set +x
    holds="" bad_line=0
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        line=${line#"${line%%[! $'\t']*}"}
        if [[ -z $line || $line == '#'* ]]; then continue; fi
        name=${line%%[ $'\t']*}
        rest=${line#"$name"}
        rest=${rest#"${rest%%[! $'\t']*}"}
        rest=${rest%%[ $'\t\r']*}
        if [ "$name $rest" = "${public%% *} $blob" ]; then holds=yes; fi
        if [[ ! $name =~ ^[a-z0-9@.-]+$ || -z $rest ]] ||
            ! printf '%s %s\n' "$name" "$rest" | ssh-keygen -l -f - >/dev/null 2>&1; then
            bad_line=$number
            return
        fi
    done 2>/dev/null <"$1"
}

check_sshd_ca() {
    local file=${sshd[trustedusercakeys]:-none} holds bad_line algorithm
    if [ -z "$blob" ]; then
        skip "$NO_KEY" sshd_trusts_ca
        return
    elif [ "$file" = none ]; then
        say sshd_does_not_trust_ca "TrustedUserCAKeys is none"
        return
    elif [ ! -f "$file" ]; then
        say sshd_does_not_trust_ca "there is no file $file"
        return
    fi
    scan_keys "$file"
    algorithm=${public%% *}
    if [ "$algorithm" = ssh-rsa ]; then algorithm=rsa-sha2-512; fi # with SHA-2 the service signs
    find_above "$file"
    if [ -z "$holds" ] && ! holds_public "$file"; then
        say sshd_does_not_trust_ca "$file lacks $print"
    elif [ -z "$holds" ]; then
        say sshd_ca_line_malformed "line $bad_line of $file; sshd reads nothing from there on"
    elif find_unsafe "${above[@]}" "$file"; then
        say sshd_ca_file_unsafe "$fault_at: $fault"
    elif [[ ,${sshd[casignaturealgorithms]:-}, != *",$algorithm,"* ]]; then
        say sshd_ca_algorithm_refused "CASignatureAlgorithms lacks $algorithm"
    elif is_revoked; then
        say sshd_ca_revoked "RevokedKeys ${sshd[revokedkeys]} has $print"
    else
        say sshd_trusts_ca "$file"
    fi
}

# Whether the list that RevokedKeys names has the CA. Sets `list_fault`, if sshd cannot read it and so refuses each key.
is_revoked() {
    local file=${sshd[revokedkeys]:-none} told holds bad_line status
    list_fault=""
    if [ "$file" = none ]; then return 1; fi
    if [ ! -f "$file" ]; then
        list_fault="there is no file $file"
        return 1
    fi
    told=$(ssh-keygen -Q -f "$file" <(printf '%s %s\n' "${public%% *}" "$blob") 2>&1 </dev/null)
    status=$?
    if ((status < 2)); then return $((status == 0)); fi
    if [[ $told != *"invalid magic"* ]]; then
        list_fault="ssh-keygen cannot read $file"
        return 1
    fi
    scan_keys "$file" # a list of public keys
    if [ -z "$holds" ] && ((bad_line)); then list_fault="line $bad_line of $file is not a public key"; fi
    [ -n "$holds" ]
}

# matches TEXT PATTERN: as sshd compares names, with * and ? alone
matches() {
    local pattern=${2//\\/\\\\}
    pattern=${pattern//\[/\\[}
    pattern=${pattern//\(/\\(}
    # shellcheck disable=SC2053 # it is a pattern
    [[ $1 == $pattern ]]
}

# names_user PATTERN...: whether one of AllowUsers or DenyUsers names the login user. Sets `by` to it, and `elsewhere` if
# it names the address, too, which is not compared.
names_user() {
    local pattern
    by="" elsewhere=""
    for pattern; do
        if matches "$LOGIN_USER" "${pattern%%@*}"; then
            by=$pattern
            if [[ $pattern != *@* ]]; then
                elsewhere=""
                return 0
            fi
            elsewhere=$pattern
        fi
    done
    [ -n "$by" ]
}

# names_group PATTERN...: whether one names a group of `groups`; sets `by`.
names_group() {
    local pattern group
    for pattern; do
        for group in "${groups[@]}"; do
            if matches "$group" "$pattern"; then
                by=$pattern
                return 0
            fi
        done
    done
    return 1
}

# May the login user log in with a certificate? By all of `sshd -T` that decides, in sshd's order.
check_sshd_login() {
    local failed=${count[FAIL]} account=() groups=() by="" elsewhere="" list_fault="" unproved="" method single=""
    local words=()
    if [ "${sshd[refuseconnection]:-no}" != no ]; then say sshd_refuses_user "RefuseConnection yes"; fi
    if [ "${sshd[pubkeyauthentication]:-no}" != yes ]; then say sshd_refuses_keys "PubkeyAuthentication no"; fi
    if [[ ,${sshd[pubkeyacceptedalgorithms]:-}, != *",$USER_ALGORITHM,"* ]]; then
        say sshd_refuses_key_kind "PubkeyAcceptedAlgorithms lacks $USER_ALGORITHM"
    fi
    split_words "${sshd[authenticationmethods]:-any}"
    for method in "${words[@]}"; do
        if [ "$method" = any ] || [ "$method" = publickey ]; then single=yes; fi
    done
    if [ -z "$single" ]; then
        say sshd_requires_more_than_a_key "AuthenticationMethods ${sshd[authenticationmethods]}"
    fi
    check_account
    check_access_lists
    if [ -n "$blob" ]; then is_revoked || true; fi
    if [ -n "$list_fault" ]; then say sshd_revocation_list_unusable "$list_fault; sshd refuses every key"; fi
    if [ "${sshd[authorizedprincipalscommand]:-none}" != none ]; then
        unproved+="AuthorizedPrincipalsCommand decides; "
    fi
    if [ -n "$sshd_addresses" ]; then unproved+="Match $sshd_addresses asks for the client's address; "; fi
    if ((count[FAIL] == failed)); then
        if [ -n "$unproved" ]; then
            say sshd_login_not_proved "${unproved%; }"
        else
            say sshd_accepts_login "$LOGIN_USER, from $LOGIN_FROM"
        fi
    fi
}

# Sets `words`; the text may come from a configuration file, so nothing in it is expanded.
split_words() { IFS=' ' read -r -a words < <(printf '%s\n' "$1"); }

# The following are parts of check_sshd_login and share its variables.

# Sets `account` to the fields of passwd(5). sshd refuses an account without a shell, and a locked one if not PAM's.
check_account() {
    local shell state expires
    IFS=: read -r -a account < <(getent passwd -- "$LOGIN_USER")
    if [ ${#account[@]} -lt 6 ]; then
        say sshd_account_unusable "there is no account $LOGIN_USER"
        return
    fi
    shell=${account[6]:-/bin/sh}
    if [ ! -f "$shell" ] || [ ! -x "$shell" ]; then
        say sshd_account_unusable "the login shell of $LOGIN_USER, $shell, cannot be run"
    elif [ "${sshd[usepam]:-no}" = no ]; then
        # The first character of the password's hash says whether it is locked, shadow(5); no more of it is read.
        state=$(getent shadow -- "$LOGIN_USER" | cut -d: -f2 | cut -c1)
        expires=$(getent shadow -- "$LOGIN_USER" | cut -d: -f8)
        if [ "$state" = '!' ] || [[ ${account[1]} == '!'* ]]; then
            say sshd_account_unusable "$LOGIN_USER is locked, and UsePAM is no"
        elif [[ $expires =~ ^[0-9]{1,7}$ ]] && ((10#$expires < $(date +%s) / 86400)); then
            say sshd_account_unusable "the account $LOGIN_USER has expired"
        fi
    fi
}

check_access_lists() {
    if [ ${#account[@]} -lt 6 ]; then return; fi
    if [ "${account[2]}" = 0 ] && [[ ${sshd[permitrootlogin]:-} == @(no|forced-commands-only) ]]; then
        say sshd_refuses_user "PermitRootLogin ${sshd[permitrootlogin]}"
    fi
    split_words "${sshd[denyusers]:-}"
    if names_user "${words[@]}"; then
        if [ -z "$elsewhere" ]; then say sshd_refuses_user "DenyUsers $by"; else unproved+="DenyUsers $elsewhere; "; fi
    fi
    split_words "${sshd[allowusers]:-}"
    if [ ${#words[@]} -gt 0 ]; then
        if ! names_user "${words[@]}"; then
            say sshd_refuses_user "AllowUsers lacks $LOGIN_USER"
        elif [ -n "$elsewhere" ]; then
            unproved+="AllowUsers $elsewhere; "
        fi
    fi
    mapfile -t groups < <(id -Gn -- "$LOGIN_USER" 2>/dev/null | tr ' ' '\n')
    split_words "${sshd[denygroups]:-}"
    if names_group "${words[@]}"; then say sshd_refuses_user "DenyGroups $by"; fi
    split_words "${sshd[allowgroups]:-}"
    if [ ${#words[@]} -gt 0 ] && ! names_group "${words[@]}"; then
        say sshd_refuses_user "AllowGroups has no group of $LOGIN_USER"
    fi
}

check_principals() {
    local path paths=() own principals=${sshd[authorizedprincipalsfile]:-none}
    local command=${sshd[authorizedprincipalscommand]:-none}
    local -A expanded=()
    if [ "$principals" = none ] && [ "$command" = none ]; then
        if [[ $PRINCIPALS == *",$LOGIN_USER,"* ]]; then
            say principals_file "none; a certificate must name the account itself"
        else
            say principals_file_lacks_principal "none; certificates name ${PRINCIPALS//,/ }, not $LOGIN_USER"
        fi
        return
    fi
    if [ "$principals" != none ]; then expand_for_accounts "$principals"; fi
    for path in "${!expanded[@]}"; do
        find_above "$path"
        paths+=("${above[@]}" "$path")
    done
    if [ "$command" != none ]; then
        find_above "${command%% *}"
        paths+=("${above[@]}" "${command%% *}")
    fi
    if [ ${#paths[@]} -gt 0 ] && find_unsafe "${paths[@]}"; then
        say principals_file_unsafe "$fault_at: $fault"
        return
    fi
    own=$(expand_for "$principals" < <(getent passwd -- "$LOGIN_USER"))
    if [ -z "$own" ]; then
        skip "there is no account $LOGIN_USER" principals_file
    elif [ "$command" != none ]; then
        say principals_file "$principals, and a command"
    elif [ ! -f "$own" ]; then
        say principals_file_missing "$own; $LOGIN_USER cannot log in with a certificate until it is there"
    elif lists_principal "$own"; then
        say principals_file "$principals, ${#expanded[@]} of them"
    else
        say principals_file_lacks_principal "$own lacks ${PRINCIPALS//,/ }"
    fi
}

# Whether a line of the file has one of PRINCIPALS: its last word, as options may stand before it.
lists_principal() {
    local - line
    set +x
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%%'#'*}
        line=${line%"${line##*[! $'\t\r']}"}
        line=${line##*[ $'\t']}
        if [[ -n $line && $PRINCIPALS == *",$line,"* ]]; then return 0; fi
    done 2>/dev/null <"$1"
    return 1
}

# --- clock ------------------------------------------------------------------------------------------------------

start_clock_test() {
    clock_output=""
    if [ ! -e /run/systemd/timesync/synchronized ] && type -P timedatectl >/dev/null; then
        exec {clock_output}< <(run_to_end timedatectl show --property NTPSynchronized --value)
    fi
}

check_clock() {
    local told=yes
    if [ -n "$clock_output" ]; then read -r told <&"$clock_output"; fi
    if [ -z "$clock_output" ] && [ ! -e /run/systemd/timesync/synchronized ]; then told=""; fi
    case $told in
        yes) say clock_synchronised "certificates live for minutes" ;;
        no) say clock_not_synchronised "certificates live for minutes; start a time service" ;;
        *) say clock_unknown "neither systemd-timesyncd nor timedatectl tells; look at your time service" ;;
    esac
}

# --- other programs ---------------------------------------------------------------------------------------------

# Runs a command that must neither ask nor hang; its last line of output is "exit STATUS".
run_to_end() {
    local -
    set +x
    timeout "$PATIENCE" "$@" </dev/null 2>/dev/null
    printf '\nexit %d\n' $?
}

compose=() # the command, and its first word by itself
engine=""

find_compose() {
    local first
    if [ -n "${PLATFORM_RUNTIME_COMPOSE:-}" ]; then
        IFS=$' \t' read -r -a compose < <(printf '%s\n' "$PLATFORM_RUNTIME_COMPOSE")
        type -P "${compose[0]:-}" >/dev/null || compose=()
    elif type -P docker >/dev/null && timeout 5 docker compose version </dev/null >/dev/null 2>&1; then
        compose=(docker compose)
    elif type -P podman >/dev/null && timeout 5 podman compose version </dev/null >/dev/null 2>&1; then
        compose=(podman compose)
    elif type -P podman-compose >/dev/null; then
        compose=(podman-compose)
    fi
    engine=${PLATFORM_RUNTIME_ENGINE:-}
    if [ -z "$engine" ]; then
        first=${compose[0]:-}
        case ${first##*/} in
            podman*) engine=podman ;;
            docker*) engine=docker ;;
            *) engine=$(type -P docker || type -P podman) ;;
        esac
    fi
    type -P "$engine" >/dev/null || engine=""
}

# --- the merged configuration -----------------------------------------------------------------------------------
# YAML as `docker compose config` and `podman-compose config` write it: block style, scalars plain, quoted or literal,
# anchors. Whatever else comes is not understood, and then the host is not ready.

config_lines=()
places=()              # in the order of the text; parts joined by SEP, items of a list by number
declare -A config=()   # place → value, empty for one that holds others

parse_config() {
    local - at=0 line content inner name rest value indent pending="" pending_indent=-1
    local -a map_indent=(-1) map_kind=(root) map_place=("") map_count=(0)
    local -A anchors=()
    set +x
    config=() places=()
    while ((at < ${#config_lines[@]})); do
        line=${config_lines[at]}
        at=$((at + 1))
        content=${line#"${line%%[! ]*}"}
        indent=$((${#line} - ${#content}))
        case $content in
            '' | '#'* | ---) continue ;;
            $'\t'* | '? '*) return 1 ;;
        esac
        while [[ $content == - || $content == '- '* ]]; do
            enter_list || return 1
            inner=${content#-}
            inner=${inner#"${inner%%[! ]*}"}
            indent=$((indent + ${#content} - ${#inner}))
            content=$inner
            # An item's own lines stand to the right of its dash.
            if [ -n "$content" ]; then pending_indent=$((indent - 1)); fi
        done
        if [ -z "$content" ]; then continue; fi
        if split_key; then
            enter_map || return 1
            place=${map_place[-1]}$SEP$name
            note ""
            pending=$place pending_indent=$indent
            if [ -n "$rest" ]; then read_value "$indent" || return 1; fi
        elif [ -n "$pending" ] && ((indent > pending_indent)); then
            rest=$content place=$pending
            read_value "$pending_indent" || return 1
        else
            return 1
        fi
    done
}

# The following are parts of parse_config and share its variables.

note() {
    if [ -z "${config[$place]+noted}" ]; then places+=("$place"); fi
    config[$place]=$1
}

leave() {
    unset -v 'map_indent[-1]' 'map_kind[-1]' 'map_place[-1]' 'map_count[-1]'
}

enter() {
    map_indent+=("$indent") map_kind+=("$1") map_place+=("$pending") map_count+=(0)
    pending=""
}

# A dash at `indent`: an item of the list there, which may begin with it. Its place is pending.
enter_list() {
    while ((map_indent[-1] > indent)); do leave; done
    # A list under a key may stand as far left as the key.
    if [ -n "$pending" ]; then
        if ((indent > pending_indent)) || [[ ${map_kind[-1]} == map && $indent == "$pending_indent" ]]; then
            enter list
        fi
    fi
    [[ ${map_kind[-1]} == list && ${map_indent[-1]} == "$indent" ]] || return 1
    place=${map_place[-1]}$SEP${map_count[-1]}
    map_count[-1]=$((map_count[-1] + 1))
    note ""
    pending=$place pending_indent=$indent
}

enter_map() {
    while ((map_indent[-1] > indent)); do leave; done
    if [[ ${map_kind[-1]} == list && ${map_indent[-1]} == "$indent" ]]; then leave; fi
    if [ "${map_kind[-1]}" = root ] || { [ -n "$pending" ] && ((indent > pending_indent)); }; then
        enter map
    fi
    [[ ${map_kind[-1]} == map && ${map_indent[-1]} == "$indent" ]]
}

# `content` → `name` and `rest`, if it begins with a key.
split_key() {
    case $content in
        \"* | \'*)
            local closing=${content:0:1} body=${content:1}
            name=${body%%"$closing"*}
            body=${body#"$name$closing"}
            [[ $body == : || $body == ': '* ]] && [[ $name != *\\* ]] || return 1
            rest=${body#:}
            ;;
        *:)
            name=${content%:} rest=""
            [[ $name != *': '* ]] || split_first
            ;;
        *': '*) split_first ;;
        *) return 1 ;;
    esac
    rest=${rest#"${rest%%[! ]*}"}
}

split_first() {
    name=${content%%: *}
    rest=${content#"$name: "}
}

# `rest`, and as many lines more as belong to it, is the value of `place`; $1 is the indent of what holds it.
read_value() {
    local anchor known
    if [[ $rest == '&'* ]]; then
        anchor=${rest%% *}
        anchors[${anchor#&}]=$place
        rest=${rest#"$anchor"}
        rest=${rest# }
        if [ -z "$rest" ]; then return 0; fi
    fi
    case $rest in
        '{}' | '[]') value="" ;;
        '*'*)
            anchor=${anchors[${rest#\*}]:-}
            [ -n "$anchor" ] || return 1
            local target=$place
            for known in "${places[@]}"; do
                if [[ $known == "$anchor" || $known == "$anchor$SEP"* ]]; then
                    place=$target${known#"$anchor"}
                    note "${config[$known]}"
                fi
            done
            pending=""
            return 0
            ;;
        \"*) read_quoted '"' || return 1 ;;
        \'*) read_quoted "'" || return 1 ;;
        '|' | '|-') read_literal "$1" ;;
        [\>\|\!\{\[%@\`]*) return 1 ;;
        *) read_plain "$1" || return 1 ;;
    esac
    note "$value"
    pending=""
}

read_plain() {
    local more
    value=$rest
    while ((at < ${#config_lines[@]})); do
        more=${config_lines[at]#"${config_lines[at]%%[! ]*}"}
        if [ -z "$more" ] || ((${#config_lines[at]} - ${#more} <= $1)); then break; fi
        value+=" $more"
        at=$((at + 1))
    done
    # What looks like another key in the middle is none that a program wrote.
    [[ $value != *': '* && $value != *: ]]
}

read_literal() {
    local form=$rest margin="" more
    value=""
    while ((at < ${#config_lines[@]})); do
        more=${config_lines[at]#"${config_lines[at]%%[! ]*}"}
        if [ -n "$more" ]; then
            if ((${#config_lines[at]} - ${#more} <= $1)); then break; fi
            margin=${margin:-$((${#config_lines[at]} - ${#more}))}
        fi
        value+=${config_lines[at]:${margin:-0}}$'\n'
        at=$((at + 1))
    done
    value=${value%"${value##*[!$'\n']}"}
    if [ "$form" = '|' ]; then value+=$'\n'; fi
}

# A scalar in quotes of the kind $1; a line end in it is one blank, an empty line a line end, unless escaped.
read_quoted() {
    local text=${rest:1} more breaks
    while ! closed "$1"; do
        breaks=""
        while ((at < ${#config_lines[@]})) && [[ ${config_lines[at]} != *[!\ ]* ]]; do
            breaks+=$'\n'
            at=$((at + 1))
        done
        ((at < ${#config_lines[@]})) || return 1
        more=${config_lines[at]#"${config_lines[at]%%[! ]*}"}
        at=$((at + 1))
        if [ "$1" = '"' ] && [[ $text =~ (^|[^\\])(\\\\)*\\$ ]]; then
            text=${text%\\}$breaks$more
        else
            text=${text%"${text##*[! ]}"}${breaks:- }$more
        fi
    done
    if [ "$1" = "'" ]; then
        value=${text%\'*}
        value=${value//\'\'/\'}
    else
        value=${text%\"*}
        unescape || return 1
    fi
}

# Whether `text` ends with the closing quote.
closed() {
    local body=${text%"${text##*[! ]}"}
    [[ $body == *"$1" ]] || return 1
    text=$body
    if [ "$1" = "'" ]; then
        body=${text//\'\'/}
        [[ $body == *\' ]]
    else
        [[ ! ${text%\"} =~ (^|[^\\])(\\\\)*\\$ ]]
    fi
}

# The escapes of YAML's double quotes, and so of JSON's strings, in `value`.
unescape() {
    local from=$value digits code
    value=""
    while [[ $from == *\\* ]]; do
        value+=${from%%\\*}
        from=${from#*\\}
        digits=0
        case $from in
            n*) value+=$'\n' ;;
            t*) value+=$'\t' ;;
            r*) value+=$'\r' ;;
            e*) value+=$'\e' ;;
            a*) value+=$'\a' ;;
            b*) value+=$'\b' ;;
            f*) value+=$'\f' ;;
            v*) value+=$'\v' ;;
            N*) append_character 0x85 ;;
            _*) append_character 0xa0 ;;
            L*) append_character 0x2028 ;;
            P*) append_character 0x2029 ;;
            x*) digits=2 ;;
            u*) digits=4 ;;
            U*) digits=8 ;;
            *) value+=${from:0:1} ;;
        esac
        if ((digits > 0)); then
            # Digits alone: what stands in an arithmetic expression is evaluated, an index of an array as a command.
            code=${from:1:digits}
            if [[ ${#code} -ne digits || $code == *[!0-9a-fA-F]* ]]; then return 1; fi
            code=$((16#$code))
            append_character "$code"
        fi
        from=${from:1+digits}
    done
    value+=$from
}

# A code point as UTF-8; bash itself writes none in the C locale.
append_character() {
    local bytes
    if (($1 < 0x80)); then
        printf -v bytes '\\%03o' "$1"
    elif (($1 < 0x800)); then
        printf -v bytes '\\%03o' $((0xc0 | $1 >> 6)) $((0x80 | $1 & 0x3f))
    elif (($1 < 0x10000)); then
        printf -v bytes '\\%03o' $((0xe0 | $1 >> 12)) $((0x80 | $1 >> 6 & 0x3f)) $((0x80 | $1 & 0x3f))
    else
        printf -v bytes '\\%03o' $((0xf0 | $1 >> 18)) $((0x80 | $1 >> 12 & 0x3f)) \
            $((0x80 | $1 >> 6 & 0x3f)) $((0x80 | $1 & 0x3f))
    fi
    printf -v bytes '%b' "${bytes//\\/\\0}"
    value+=$bytes
}

# Sets `value` to what stands at the place that the arguments name, empty if nothing does.
look_up() {
    local IFS=$SEP
    value=${config["$SEP$*"]-}
}

# Sets `items` to the values of a list of scalars, or of a map's keys as KEY=VALUE.
list_items() {
    local - IFS=$SEP known prefix
    set +x
    prefix=$SEP$*$SEP
    items=()
    for known in "${places[@]}"; do
        if [[ $known == "$prefix"* && ${known#"$prefix"} != *"$SEP"* ]]; then
            known=${known#"$prefix"}
            case $known in
                *[!0-9]*) items+=("$known=${config[$prefix$known]}") ;;
                *) items+=("${config[$prefix$known]}") ;;
            esac
        fi
    done
}

# --- the allow-list ---------------------------------------------------------------------------------------------
# Every key and value that is not in the list is a fault: what one does not know is not good.

allow_section=() allow_place=() allow_value=() # one entry for each line; a place is a pattern of bash
readonly ONE_PART="+([!$SEP])"

load_allow_list() {
    local section place value
    [ -f "$allow_list" ] || return 1
    while IFS=' ' read -r section place value || [ -n "$section" ]; do
        if [[ -z $section || $section == '#'* ]]; then continue; fi
        if [ "$section" != mount ]; then place=${place//./$SEP} place=${place//\*/$ONE_PART}; fi
        allow_section+=("$section") allow_place+=("$place") allow_value+=("$value")
    done <"$allow_list"
    ((${#allow_section[@]} > 0))
}

# fits FORM VALUE: whether a value is one that a line of the list means.
fits() {
    case $1 in
        '<empty>') [[ $2 == '' || $2 == null ]] ;;
        '<bool>') [[ $2 == true || $2 == false ]] ;;
        '<word>') [[ $2 =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]] ;;
        '<number>') [[ $2 =~ ^-?[0-9]+(\.[0-9]+)?$ ]] ;;
        '<size>') [[ $2 =~ ^[0-9]+(\.[0-9]+)?([kmgtKMGT]i?)?[bB]?$ ]] ;;
        '<time>') [[ $2 =~ ^[0-9][0-9.a-z]*$ ]] ;;
        '<path>') [[ $2 == /* && $2/ != */../* ]] ;;
        '<text>') [[ $2 != null && $2 != '~' ]] ;; # null: the value of whoever starts compose
        *) [ "$2" = "$1" ] ;;
    esac
}

# is_allowed SECTION PLACE VALUE: sets `known` to yes if the list has the place with other values.
is_allowed() {
    local at
    known=""
    for at in "${!allow_place[@]}"; do
        # shellcheck disable=SC2053  # it is a pattern
        if [[ ${allow_section[at]} == "$1" && $2 == ${allow_place[at]} ]]; then
            known=yes
            if fits "${allow_value[at]}" "$3"; then return 0; fi
        fi
    done
    return 1
}

# Compares the whole merged configuration with the list.
check_allowed() {
    local - place value known failed=${count[FAIL]} rest service at
    local -A holds_others=()
    set +x
    if ! load_allow_list; then
        say compose_allow_list_missing "$allow_list"
        skip "no allow-list" compose_other_services
        return
    fi
    for place in "${places[@]}"; do holds_others[.${place%"$SEP"*}]=yes; done
    for place in "${places[@]}"; do
        if [ -n "${holds_others[.$place]-}" ]; then continue; fi
        value=${config[$place]}
        rest=${place#"$SEP"}
        if [[ $rest != "services$SEP"* ]]; then
            case $rest in
                "volumes${SEP}ledger" | "volumes${SEP}ledger$SEP"*) compare_place ledger "$rest" "" ;;
                x-podman* | [!x]* | x[!-]*) compare_place top "$rest" "" ;; # other extensions mean nothing
            esac
            continue
        fi
        rest=${rest#"services$SEP"}
        service=${rest%%"$SEP"*}
        if [ "$rest" = "$service" ]; then continue; fi
        rest=${rest#*"$SEP"}
        if [[ $rest =~ ^environment${SEP}[0-9]+$ && $value == *=* ]]; then
            rest=environment$SEP${value%%=*} value=${value#*=}
        fi
        if [ "$service" != "$SERVICE" ]; then
            if is_named "$service"; then compare_place other "$rest" "$service: "; fi
        elif [[ $rest != "volumes$SEP"* ]]; then
            compare_place service "$rest" ""
        fi
    done
    for ((at = 0; ; at++)); do
        if [ -z "${config["${SEP}services$SEP$SERVICE${SEP}volumes$SEP$at"]+there}" ]; then break; fi
        compare_mount "$at"
    done
    check_steering
    if ((count[FAIL] == failed)); then say compose_allowed "every key and value is in ${allow_list##*/}"; fi
}

# compare_place SECTION PLACE PREFIX: a part of check_allowed. Only values of known keys that hold no secret are shown.
compare_place() {
    local told=${2//"$SEP"/.}
    if is_allowed "$1" "$2" "$value"; then return; fi
    if [ "$1" = other ]; then
        say compose_other_service_not_allowed "$3$told"
    else
        if [[ -n $known && $told != environment.* ]]; then told+=" is ${value:-empty}"; fi
        say compose_not_allowed "$told"
    fi
}

# compare_mount NUMBER: a volume of our service, in one form; a part of check_allowed.
compare_mount() {
    local prefix=${SEP}services$SEP$SERVICE${SEP}volumes$SEP$1 form type=bind source target rights=rw key_of extra="" at
    form=${config[$prefix]}
    if [ -n "$form" ]; then
        source=${form%%:*} target=${form#*:}
        case $target in
            *:ro) target=${target%:ro} rights=ro ;;
            *:rw) target=${target%:rw} ;;
        esac
        if [[ $source != [/.~]* ]]; then type=volume; fi
    else
        look_up services "$SERVICE" volumes "$1" type
        type=$value
        look_up services "$SERVICE" volumes "$1" source
        source=$value
        look_up services "$SERVICE" volumes "$1" target
        target=$value
        for place in "${places[@]}"; do
            if [[ $place != "$prefix$SEP"* ]]; then continue; fi
            key_of=${place#"$prefix$SEP"}
            case ${key_of//"$SEP"/.}=${config[$place]} in
                type=* | source=* | target=* | bind= | volume= | volume.nocopy=false | read_only=false) ;;
                bind.create_host_path=true | bind.create_host_path=false) ;;
                read_only=true) rights=ro ;;
                *) extra=" with ${key_of//"$SEP"/.}" ;;
            esac
        done
    fi
    if [ -z "$extra" ]; then
        for at in "${!allow_section[@]}"; do
            if [[ ${allow_section[at]} == mount && "${allow_place[at]} ${allow_value[at]% *}" == "$type $target $rights" ]] &&
                fits "${allow_value[at]##* }" "$source"; then
                return
            fi
        done
    fi
    say compose_not_allowed "volumes.$1: a $rights mount of type ${type:-none} at $target$extra"
}

is_named() {
    local name
    for name in "${named_services[@]}"; do
        if [ "$name" = "$1" ]; then return 0; fi
    done
    return 1
}

# Variables of compose and podman change what `up` makes of the files; no form of `config` shows it.
check_steering() {
    local - name file line
    set +x
    while IFS= read -r name; do
        if steers "$name"; then say compose_steered "$name in the environment"; fi
    done < <(compgen -e)
    for file in "${base%/*}/.env" /.env; do
        if [ ! -e "$file" ]; then continue; fi
        while IFS= read -r line || [ -n "$line" ]; do
            if [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?[\'\"]?([A-Za-z_][A-Za-z0-9_]*) ]] &&
                steers "${BASH_REMATCH[2]}"; then
                say compose_steered "${BASH_REMATCH[2]} in $file"
            fi
        done <"$file"
    done
}

steers() {
    case $1 in
        COMPOSE_PROJECT_NAME | PODMAN_COMPOSE_PROVIDER | PODMAN_COMPOSE_WARNING_LOGS) return 1 ;;
        COMPOSE_* | PODMAN_*) return 0 ;;
        *) return 1 ;;
    esac
}

# --- other services ---------------------------------------------------------------------------------------------

check_other_services() {
    local - place name names=() failed=${count[FAIL]} at
    local guarded=() guarded_as=() guarded_real=()
    set +x
    for place in "${places[@]}"; do
        name=${place#"${SEP}services$SEP"}
        if [[ $name == "$place" || $name == *"$SEP"* || $name == "$SERVICE" ]]; then continue; fi
        names+=("$name")
        if ! is_named "$name"; then say compose_other_service_not_named "$name"; fi
    done
    if [ ${#names[@]} -eq 0 ]; then
        say compose_other_services "none"
        return
    fi
    find_guarded
    for at in "${!mount_real[@]}"; do
        if [ "${mount_service[at]}" != "$SERVICE" ]; then compare_reach "$at"; fi
    done
    check_named_volumes
    if ((count[FAIL] == failed)); then say compose_other_services "${names[*]}: no privilege, and no path to key, ledger or sockets"; fi
}

guard() {
    local why=$1
    shift
    for place; do guarded+=("$place") guarded_as+=("$why"); done
}

# Sets `guarded`, paths that no other service may see, and what they are; a part of check_other_services.
find_guarded() {
    local at store
    for at in "${!mount_real[@]}"; do
        if [ "${mount_service[at]}" = "$SERVICE" ]; then guard "a mount of $SERVICE" "${mount_real[at]}"; fi
    done
    guard "a socket" "${SOCKETS[@]}"
    guard "the ledger" "${STORES[@]}"
    guard "the host itself" "${HOST_ONLY[@]}"
    if [ -n "$engine" ]; then
        for store in .Store.GraphRoot .Store.VolumePath .DockerRootDir; do
            store=$(timeout 5 "$engine" info --format "{{$store}}" </dev/null 2>/dev/null)
            if [[ $store == /* ]]; then guard "the ledger" "$store"; fi
        done
    fi
    guard writable "${HOST_WRITABLE_BY_ROOT[@]}" "${base%/*}" "${overlay%/*}" "${allow_list%/*}" \
        "$(dirname -- "${BASH_SOURCE[0]}")"
    mapfile -t -d '' guarded_real < <(realpath -m -z -- "${guarded[@]}" 2>/dev/null)
}

# compare_reach NUMBER: a mount of another service; a part of check_other_services.
compare_reach() {
    local path=${mount_real[$1]} guard why at
    if [[ $path == *.sock ]]; then
        say compose_other_service_reaches "${mount_service[$1]} has ${mount_source[$1]}: a socket"
        return
    fi
    for at in "${!guarded_real[@]}"; do
        guard=${guarded_real[at]} why=${guarded_as[at]}
        if [[ $path != "$guard" && $path/ != "${guard%/}/"* && $guard/ != "${path%/}/"* ]]; then continue; fi
        if [ "$why" = writable ]; then
            if [ "${mount_rights[$1]}" = ro ]; then continue; fi
            why="what root runs or reads"
        fi
        say compose_other_service_reaches "${mount_service[$1]} has ${mount_source[$1]}: $why"
        return
    done
}

# The ledger's volume under its own name or another one; a part of check_other_services.
check_named_volumes() {
    local place name source ours told
    look_up volumes ledger name
    ours=${value:-ledger}
    for place in "${places[@]}"; do
        [[ $place =~ ^${SEP}services${SEP}([^$SEP]+)${SEP}volumes${SEP}([0-9]+)$ ]] || continue
        name=${BASH_REMATCH[1]}
        if [ "$name" = "$SERVICE" ]; then continue; fi
        source=${config[$place]%%:*}
        if [ -z "$source" ]; then
            look_up services "$name" volumes "${BASH_REMATCH[2]}" source
            source=$value
        fi
        if [[ -z $source || $source == [/.~]* ]]; then continue; fi
        look_up volumes "$source" name
        told=${value:-$source}
        if [[ $source == ledger || $told == "$ours" || $told == *[_-]ledger ]]; then
            say compose_other_service_reaches "$name has the volume $told: the ledger"
        fi
    done
}

# --- compose ----------------------------------------------------------------------------------------------------

merged=""   # yes: `config` holds the merged configuration
expected="" # capabilities that the running container must have, sorted
readonly NO_MERGE="no merged configuration"

# Starts everything that takes its time; each is read where its turn comes.
start_engine() {
    local files=(-f "$base" -f "$overlay") seen=yes
    merge_output="" bare_output="" engine_output="" version_output=""
    find_compose
    if [ ${#compose[@]} -gt 0 ]; then exec {version_output}< <(run_to_end "${compose[@]}" version); fi
    if [ ! -f "$base" ] || [ ! -f "$overlay" ]; then seen=""; fi
    if [ ${#compose[@]} -gt 0 ] && [ -n "$seen" ]; then
        if [ -n "$key" ]; then exec {merge_output}< <(run_to_end "${compose[@]}" "${files[@]}" config); fi
        exec {bare_output}< <(merge_without_variable "${files[@]}")
    fi
    if [ -n "$engine" ]; then exec {engine_output}< <(ask_engine); fi
}

# Prints how it ends without the variable: merged, named (stopped with a message that names it) or other.
merge_without_variable() {
    local - told
    set +x
    if told=$(unset -v "$MOUNTED_VARIABLE"; timeout "$PATIENCE" "${compose[@]}" "$@" config </dev/null 2>&1); then
        echo merged
    elif [[ $told == *"$MOUNTED_VARIABLE"* ]]; then
        echo named
    else
        echo other
    fi
}

# Prints "running NAME" and facts in further lines for each running container of the service; then as run_to_end.
# A template picks single fields, so that the environment, which may hold secrets, stays in the engine.
ask_engine() {
    local - template powers line told ids=()
    set +x
    case $(timeout 5 "$engine" --version </dev/null 2>/dev/null) in
        *podman*) powers='{{range .BoundingCaps}}{{.}} {{end}}' ;;
        *) powers='{{range .HostConfig.CapAdd}}{{.}} {{end}}/ {{range .HostConfig.CapDrop}}{{.}} {{end}}' ;;
    esac
    template='running {{.Name}}
mode {{range .Config.Env}}{{if eq . "SIGNER_MODE=local"}}local{{end}}{{if eq . "SIGNER_MODE=vault"}}vault{{end}}'
    template+='{{if eq . "SIGNER_MODE=shadow"}}shadow{{end}}{{end}}
user {{.Config.User}}
root {{.HostConfig.ReadonlyRootfs}}
privileged {{.HostConfig.Privileged}}
security {{range .HostConfig.SecurityOpt}}{{.}} {{end}}
powers '"$powers"'
{{range .Mounts}}mount {{.RW}} {{json .Source}}
{{end}}'
    for _ in 1 2 3; do # a container may end between the two questions; an engine that hangs is asked once
        mapfile -t ids < <(run_to_end "$engine" ps --no-trunc --quiet --filter "label=com.docker.compose.service=$SERVICE")
        line=${ids[-1]}
        unset -v 'ids[-1]' 'ids[-1]'
        if [ "$line" != "exit 0" ] || [ ${#ids[@]} -eq 0 ]; then
            printf '%s\n' "$line"
            return
        fi
        told=$(run_to_end "$engine" inspect --type container --format "$template" "${ids[@]}")
        case ${told##*$'\n'} in "exit 0" | "exit 124") break ;; esac
    done
    printf '%s\n' "$told"
}

# podman-compose before 1.3 and docker-compose v1 read the overlays in another way, or leave containers as they are. What
# tells no version is left to the checks of what it merges.
check_compose_version() {
    local lines=() line name="" number=""
    if [ ${#compose[@]} -eq 0 ] || [ -z "$engine" ]; then return; fi
    mapfile -t lines <&"$version_output"
    for line in "${lines[@]}"; do
        if [[ $line =~ ^(podman-composer?|docker-compose|Docker\ Compose)\ version\ +v?([0-9]+)\.([0-9]+) ]]; then
            name=${BASH_REMATCH[1]} number=${BASH_REMATCH[2]}.${BASH_REMATCH[3]}
            case $name in
                podman*) if ((BASH_REMATCH[2] > 1 || (BASH_REMATCH[2] == 1 && BASH_REMATCH[3] >= 3))); then name=""; fi ;;
                *) if ((BASH_REMATCH[2] >= 2)); then name=""; fi ;;
            esac
            break
        fi
    done
    if [ -n "$name" ]; then
        say compose_too_old "$name $number"
    else
        say compose_found "${compose[*]}${number:+ $number}, engine ${engine##*/}"
    fi
}

check_compose() {
    local needed=(compose_merged compose_allowed compose_other_services overlay_mount overlay_mode service_hardened image_present) why
    check_compose_version
    if [ ${#compose[@]} -eq 0 ]; then
        say compose_missing "${PLATFORM_RUNTIME_COMPOSE:-neither docker compose, podman compose nor podman-compose}"
    fi
    if [ -z "$engine" ]; then say engine_missing "${PLATFORM_RUNTIME_ENGINE:-neither docker nor podman}"; fi
    if [ -f "$base" ] && [ -f "$overlay" ]; then say compose_files "$base, $overlay"; fi
    if [ ! -f "$base" ]; then say compose_base_missing "$base"; fi
    if [ ! -f "$overlay" ]; then say compose_overlay_missing "$overlay"; fi
    if [ -n "$merge_output" ]; then
        read_merged
    else
        why="nothing to merge, or nothing to merge it with"
        if [ -n "$bare_output" ]; then why="$VARIABLE names no key"; fi
        skip "$why" compose_merged
    fi
    if [ -n "$merged" ]; then
        check_allowed
        check_overlay_mount
        check_other_services
        check_overlay_mode
        check_service
        check_image
    else
        skip "$NO_MERGE" "${needed[@]:1}"
    fi
    check_bare_merge
}

read_merged() {
    local - known
    set +x
    mapfile -t config_lines <&"$merge_output"
    known=${config_lines[-1]}
    unset -v 'config_lines[-1]'
    if [ "$known" != "exit 0" ]; then
        say compose_merge_failed "${compose[*]} ends with ${known#exit }"
    elif ! parse_config; then
        say compose_config_not_understood "what ${compose[*]} config prints has a form that is new to this script"
    elif [ -z "${config["${SEP}services$SEP$SERVICE"]+there}" ]; then
        say compose_service_missing "$SERVICE is not in it"
    else
        merged=yes
        say compose_merged "$SERVICE, ${#places[@]} entries"
    fi
}

check_bare_merge() {
    local ended=""
    if [ -z "$bare_output" ]; then
        skip "nothing to merge, or nothing to merge it with" overlay_needs_variable
        return
    fi
    read -r ended <&"$bare_output"
    case $ended in
        named) say overlay_needs_variable "without it, it stops and says so" ;;
        merged) say overlay_merges_without_variable "it merges without $MOUNTED_VARIABLE" ;;
        *) say overlay_stops_for_another_reason "without $MOUNTED_VARIABLE it stops, but does not name it" ;;
    esac
}

check_overlay_mode() {
    local mode source
    mode=$(setting SIGNER_MODE)
    if [ "$mode" = local ]; then
        say overlay_mode "local"
    else
        say overlay_mode_must_be_local "it is ${mode:-not set}"
    fi
    source=$(setting SIGNER_CA_KEY_SOURCE)
    if [ "${source:-file}" != "$key_source" ]; then
        say overlay_key_source_differs "it is ${source:-not set}, $VARIABLE is set"
    fi
}

# Prints one variable of the service's environment.
setting() {
    local - item items=()
    set +x
    list_items services "$SERVICE" environment
    for item in "${items[@]}"; do
        if [[ $item == "$1="* ]]; then printf '%s' "${item#*=}"; fi
    done
}

# --- who reaches the key ----------------------------------------------------------------------------------------

aliases=() # paths under which the key can be reached on this host, itself included

# Bind mounts of the host can show one folder in several places: mounts of the same file system (same device number)
# whose root holds the key.
find_aliases() {
    local line rest at best=-1 inside lines=() devices=() roots=() points=()
    find_above "$key"
    aliases=("$key" "$(realpath -m -- "$key")")
    mapfile -t lines 2>/dev/null </proc/self/mountinfo
    for at in "${!lines[@]}"; do
        line=${lines[at]//\\/\\0} # blanks and the like are written as \040
        rest=${line#* * }         # after the mount's number and its parent's
        devices+=("${rest%% *}")
        rest=${rest#* }
        printf -v line '%b' "${rest%% *}"
        roots+=("${line%/}")
        rest=${rest#* }
        printf -v line '%b' "${rest%% *}"
        points+=("${line%/}")
        # The last of the longest is what one sees.
        if [[ ${aliases[1]} == "${points[at]}/"* ]] && ((best < 0 || ${#points[at]} >= ${#points[best]})); then
            best=$at
        fi
    done
    if ((best < 0)); then return; fi
    inside=${roots[best]}${aliases[1]#"${points[best]}"}
    for at in "${!points[@]}"; do
        if [[ ${devices[at]} == "${devices[best]}" && $inside == "${roots[at]}/"* ]]; then
            aliases+=("${points[at]}${inside#"${roots[at]}"}")
        elif [[ ${devices[at]} == "${devices[best]}" && $inside == "${roots[at]}" ]]; then
            aliases+=("${points[at]}") # the file alone is mounted there
        fi
    done
}

# reaches PATH: whether somebody who has this path, without links in it, has the key.
reaches() {
    local path
    for path in "${aliases[@]}"; do
        if [[ $path == "$1" || $path == "${1%/}/"* ]]; then return 0; fi
    done
    for path in "${above[@]}" "$key"; do
        if [ "$1" -ef "$path" ]; then return 0; fi
    done
    return 1
}

# One entry for each mount of a path of this host: who, what, where, `ro` or `rw`, whether the engine may create it.
mount_service=() mount_source=() mount_target=() mount_rights=() mount_created=() mount_real=()

add_mount() {
    local source=$2 value
    # A named volume may be a folder of this host in disguise.
    if [[ $source != [/.~]* ]]; then
        look_up volumes "$source" driver_opts device
        if [[ $value != [/.~]* ]]; then return; fi
        source=$value
    fi
    # `docker compose config` doubles every dollar.
    if [ "$source" != "$mounted" ]; then source=${source//\$\$/\$}; fi
    case $source in
        \~ | \~/*) source=${HOME:-/root}${source:1} ;;
        [!/]*) source=${base%/*}/$source ;;
    esac
    mount_service+=("$1") mount_source+=("$source") mount_target+=("$3") mount_rights+=("$4") mount_created+=("$5")
}

# Finds all mounts in the merged configuration, those of other services as well.
find_mounts() {
    local - place value service entry kind form
    set +x
    for place in "${places[@]}"; do
        [[ $place == "${SEP}services$SEP"*"$SEP"*"$SEP"* ]] || continue
        entry=${place#"${SEP}services$SEP"}
        service=${entry%%"$SEP"*}
        entry=${entry#*"$SEP"}
        kind=${entry%%"$SEP"*}
        entry=${entry#*"$SEP"}
        if [[ $entry == *"$SEP"* ]]; then continue; fi
        form=${config[$place]}
        case $kind in
            volumes) find_volume "$service" "$entry" ;;
            build)
                if [ "$entry" = context ]; then
                    if [[ $form != [/.~]* ]]; then form=./$form; fi
                    add_mount "$service" "$form" "a build" ro no
                fi
                ;;
            secrets | configs)
                if [ -z "$form" ]; then
                    look_up services "$service" "$kind" "$entry" source
                    form=$value
                fi
                look_up "$kind" "$form" file
                if [ -n "$value" ]; then add_mount "$service" "$value" "$kind $form" ro no; fi
                ;;
            volumes_from)
                if [[ $form == "$SERVICE" || $form == "$SERVICE:"* ]]; then
                    add_mount "$service" "$key" "all volumes of $SERVICE" "${form##*:}" no
                fi
                ;;
        esac
    done
    for place in "${places[@]}"; do # files whose lines become variables of a container
        [[ $place =~ ^${SEP}services${SEP}([^$SEP]+)${SEP}env_file(${SEP}[0-9]+(${SEP}path)?)?$ ]] || continue
        service=${BASH_REMATCH[1]} value=${config[$place]}
        case $value in
            '') continue ;;
            [/.~]*) add_mount "$service" "$value" "its environment" ro no ;;
            *) add_mount "$service" "./$value" "its environment" ro no ;;
        esac
    done
    mapfile -t -d '' mount_real < <(realpath -m -z -- "${mount_source[@]}" 2>/dev/null)
}

# One volume of a service; `form` is SOURCE:TARGET[:OPTIONS], or empty if its parts have entries of their own.
find_volume() {
    local parts source target rights=rw created type
    if [ -n "$form" ]; then
        parts=${form#*:}
        if [[ ,${parts#*:}, == *,ro,* && $parts == *:* ]]; then rights=ro; fi
        if [ "$parts" != "$form" ]; then add_mount "$1" "${form%%:*}" "${parts%%:*}" $rights yes; fi
        return
    fi
    look_up services "$1" volumes "$2" type
    type=$value
    look_up services "$1" volumes "$2" source
    source=$value
    look_up services "$1" volumes "$2" target
    target=$value
    look_up services "$1" volumes "$2" read_only
    if [ "$value" = true ]; then rights=ro; fi
    look_up services "$1" volumes "$2" bind create_host_path
    case $value in
        true) created=yes ;;
        false) created=no ;;
        *) created=unsaid ;;
    esac
    if [ "$type" = bind ] && [[ $source == [!/.~]* ]]; then source=./$source; fi
    if [ -n "$source" ]; then add_mount "$1" "$source" "$target" $rights $created; fi
}

check_overlay_mount() {
    local at own=() failed=${count[FAIL]} target seen
    find_aliases
    find_mounts
    if ((${#mount_real[@]} != ${#mount_source[@]})); then
        say compose_config_not_understood "a mount has a source that realpath cannot resolve"
        return
    fi
    for at in "${!mount_real[@]}"; do
        if [[ ${mount_service[at]} == "$SERVICE" && ${mount_source[at]} == "$mounted" ]]; then
            own+=("$at")
        elif ! reaches "${mount_real[at]}"; then
            continue
        elif [ "${mount_rights[at]}" != ro ]; then
            say overlay_key_reached_by_writable_mount "${mount_source[at]} in ${mount_service[at]}"
        elif [ "${mount_service[at]}" = "$SERVICE" ]; then
            say overlay_mount_twice "${mount_source[at]} reaches it, too"
        else
            say overlay_key_reached_by_other_service "${mount_source[at]} in ${mount_service[at]}"
        fi
    done
    if [ ${#own[@]} -eq 0 ]; then
        say overlay_mount_missing "$SERVICE does not mount $mounted"
        return
    fi
    if [ ${#own[@]} -gt 1 ]; then say overlay_mount_twice "${#own[@]} mounts of it"; fi
    for at in "${own[@]}"; do
        if [ "${mount_rights[at]}" != ro ]; then say overlay_mount_not_read_only "at ${mount_target[at]}"; fi
        case ${mount_created[at]} in
            no) continue ;;
            unsaid) if overlay_forbids_creation; then continue; fi ;;
        esac
        say overlay_mount_may_be_created "a missing folder would be created, empty"
    done
    if [ "$key_source" = agent ]; then
        target=$(setting SIGNER_CA_AGENT_SOCKET)
        target=${target:-$DEFAULT_SOCKET}
    else
        target=$(setting SIGNER_CA_KEY_FILE)
        target=${target:-$DEFAULT_TARGET}
    fi
    if [ ${#own[@]} -eq 1 ]; then
        seen=${mount_target[${own[0]}]%/}/${key##*/}
        if [ "$seen" != "$target" ]; then say overlay_mount_target_differs "it is at $seen, looked for at $target"; fi
    fi
    if ((count[FAIL] == failed)); then say overlay_mount "read-only, one mount, no other path reaches it"; fi
}

# Some versions of docker compose leave create_host_path out of what they print when it is false, others when it is
# true. Then the overlay's own words count.
overlay_forbids_creation() {
    local line
    while IFS= read -r line || [ -n "$line" ]; do
        if [[ $line =~ ^[^#]*create_host_path:[[:space:]]*false ]]; then return 0; fi
    done <"$overlay"
    return 1
}

# --- the service as configured, and as it runs ------------------------------------------------------------------

# Sets `sorted` to capabilities in one form: without CAP_, in capitals, in order, a blank around each.
sort_capabilities() {
    local name lines=()
    for name; do
        name=${name^^}
        lines+=("${name#CAP_}")
    done
    sorted=" "
    if [ ${#lines[@]} -eq 0 ]; then return; fi
    mapfile -t lines < <(printf '%s\n' "${lines[@]}" | sort -u)
    sorted=" ${lines[*]} "
}

check_service() {
    local items=() value sorted faults=()
    look_up services "$SERVICE" read_only
    if [ "$value" != true ]; then faults+=("read_only is not true"); fi
    list_items services "$SERVICE" cap_drop
    sort_capabilities "${items[@]}"
    if [[ $sorted != *" ALL "* ]]; then faults+=("cap_drop lacks ALL"); fi
    list_items services "$SERVICE" cap_add
    sort_capabilities "${items[@]}"
    expected=$sorted
    list_items services "$SERVICE" security_opt
    case " ${items[*]} " in
        *" no-new-privileges "* | *" no-new-privileges:true "* | *" no-new-privileges=true "*) ;;
        *) faults+=("security_opt lacks no-new-privileges") ;;
    esac
    if [ ${#faults[@]} -gt 0 ]; then
        printf -v value '%s; ' "${faults[@]}"
        say service_not_hardened "${value%; }"
    else
        say service_hardened "read-only root, no new privileges, capabilities:${expected% }"
    fi
    look_up services "$SERVICE" user
    expected_user=$value
}

check_image() {
    local value
    look_up services "$SERVICE" image
    if [ -z "$value" ]; then
        say image_missing "the configuration names none"
    elif [ -z "$engine" ]; then
        skip "no engine" image_present
    elif timeout "$PATIENCE" "$engine" image inspect --format x "$value" </dev/null >/dev/null 2>&1; then
        say image_present "$value"
    else
        say image_missing "${engine##*/} has no $value"
    fi
}

# Sets `told_user` to one word for root, however it is written.
name_user() {
    case $1 in
        '' | 0 | root | 0:0 | root:root | 0:root | root:0) told_user=root ;;
        *) told_user=$1 ;;
    esac
}

check_container() {
    local lines=() line
    if [ -z "$engine_output" ]; then
        skip "no engine to ask" "${CONTAINER_CHECKS[@]}"
        return
    fi
    mapfile -t lines <&"$engine_output"
    if [ "${lines[-1]}" != "exit 0" ]; then
        say engine_not_answering "$engine ends with ${lines[-1]#exit }"
        skip "the engine does not answer" "${CONTAINER_CHECKS[@]}"
    elif [[ ${lines[0]} != running* ]]; then
        say container_not_running "none of $SERVICE runs; nothing to compare"
        skip "no container runs" "${CONTAINER_CHECKS[@]}"
    else
        compare_container
    fi
}

# What runs, against what is configured; `lines` tell of one container or several.
compare_container() {
    local name="" mode=() user=() powers=() root=() mounts=() value sorted told_user="" seen_mode=""
    for line in "${lines[@]}"; do
        value=${line#* }
        case $line in
            "running "*) name=${value#/} ;;
            mode*) compare_mode ;;
            user*) compare_user ;;
            root*) if [ "$value" != true ]; then root+=("$name: its root file system can be written"); fi ;;
            privileged*) if [ "$value" != false ]; then powers+=("$name: it is privileged"); fi ;;
            security*) if [[ $value != *no-new-privileges* || $value == *no-new-privileges[:=]false* ]]; then
                powers+=("$name: it may gain privileges")
            fi ;;
            powers*) compare_powers ;;
            'mount true "'*)
                value=${value#true \"}
                value=${value%\"}
                unescape || value=/ # what is not understood may reach the key
                if [ -n "$key" ] && reaches "$(realpath -m -- "$value")"; then mounts+=("$name: $value"); fi
                ;;
        esac
    done
    verdict container_mode container_mode_unexpected "$seen_mode" "${mode[@]}"
    if [ -n "$merged" ]; then
        verdict container_user container_user_differs "$told_user" "${user[@]}"
        verdict container_capabilities container_capabilities_differ "as configured, no new privileges" "${powers[@]}"
    else
        skip "$NO_MERGE" container_user container_capabilities
    fi
    verdict container_root_read_only container_root_writable "read-only" "${root[@]}"
    if [ -n "$merged" ]; then
        verdict container_mounts container_can_write_key "no writable mount reaches the key" "${mounts[@]}"
    else
        skip "$NO_MERGE" container_mounts
    fi
}

# verdict OK-CODE FAIL-CODE DETAIL FAULT...
verdict() {
    if [ $# -eq 3 ]; then say "$1" "$3"; else say "$2" "$4"; fi
}

# The following are parts of compare_container and share its variables.

compare_mode() {
    value=${line#mode}
    seen_mode=${value# }
    case $seen_mode in
        local | shadow | vault)
            if [ "${expected_mode:-$seen_mode}" != "$seen_mode" ]; then
                mode+=("$name: $seen_mode, not $expected_mode")
            fi
            ;;
        *) mode+=("$name: ${seen_mode:-SIGNER_MODE is not set}") ;;
    esac
}

compare_user() {
    value=${line#user}
    name_user "$expected_user"
    local wanted=$told_user
    name_user "${value# }"
    if [ "$told_user" != "$wanted" ]; then user+=("$name: it runs as $told_user, the configuration says $wanted"); fi
}

# docker tells what was added and dropped, podman what is left.
compare_powers() {
    local names=()
    value=${line#powers}
    if [[ $value == *" / "* || $value == *"/ "* ]]; then
        sort_names "${value#*/}"
        if [[ $sorted != *" ALL "* ]]; then powers+=("$name: it does not drop ALL"); fi
        value=${value%%/*}
    fi
    sort_names "$value"
    if [ "$sorted" != "$expected" ]; then
        powers+=("$name: it has${sorted% }, the configuration says${expected% }")
    fi
}

sort_names() {
    local names=()
    IFS=' ' read -r -a names < <(printf '%s\n' "$1")
    sort_capabilities "${names[@]}"
}

# --- main -------------------------------------------------------------------------------------------------------

read_arguments() {
    local root
    root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
    base=$root/overlays/safe-session.yaml
    overlay=$root/overlays/safe-session-local-ca.yaml
    allow_list=$root/overlays/allow-list.txt
    if [ "$key_source" = agent ]; then overlay=$root/overlays/safe-session-agent.yaml; fi
    while [ $# -gt 0 ]; do
        case $1 in
            --json) json=yes ;;
            --sshd-elsewhere) sshd_elsewhere=yes ;;
            --codes)
                printf '%s\n' "${codes[@]}"
                exit 0
                ;;
            --help | -h)
                usage
                exit 0
                ;;
            --base | --overlay | --allow-list | --other-service | --expect-mode)
                if [ -z "${2:-}" ]; then wrong_use "$1 needs a value" "see --help"; fi
                case $1 in
                    --base) base=$2 ;;
                    --overlay) overlay=$2 ;;
                    --allow-list) allow_list=$2 ;;
                    --other-service) named_services+=("$2") ;;
                    --expect-mode) expected_mode=$2 ;;
                esac
                shift
                ;;
            *) wrong_use "unknown argument $(printf '%q' "$1")" "see --help" ;;
        esac
        shift
    done
    if [[ $base != /* ]]; then base=$PWD/$base; fi
    if [[ $overlay != /* ]]; then overlay=$PWD/$overlay; fi
    if [[ $allow_list != /* ]]; then allow_list=$PWD/$allow_list; fi
    case $expected_mode in
        '' | local | shadow | vault) ;;
        *) wrong_use "--expect-mode is vault, shadow or local" "see --help" ;;
    esac
    if [ -n "${!KEY_VARIABLE:-}" ] && [ "$key_source" = agent ]; then
        wrong_use "$KEY_VARIABLE and $AGENT_VARIABLE are both set" "unset the one of the source that is not used"
    fi
    if [ "$EUID" -ne 0 ]; then wrong_use "only root can see all of this" "run it with sudo"; fi
}

main() {
    load_catalogue
    read_arguments "$@"
    cd / || exit 1 # compose reads the .env of the folder that it starts in, and the cutover starts it there
    check_key_path
    start_engine
    start_sshd_test
    start_clock_test
    check_key_links
    if [ "$key_source" = agent ]; then
        check_agent
    else
        check_key_file
        check_key_rights
        check_key_place
        check_key_content
    fi
    read_sshd_test
    check_login_keys
    check_compose
    check_container
    check_clock
    check_sshd
    tell_summary
}

if [ "${BASH_SOURCE[0]:-$0}" = "$0" ]; then main "$@"; fi
