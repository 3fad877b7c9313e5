#!/bin/bash
# Makes an EC2 instance a worker of a farm, at its first boot: Docker, a fence around builds, and the worker as a service.
# The launch template puts the settings before it (deploy/cloudformation/ec2-fleet.yaml, deploy/terraform/ec2-fleet). It may run twice.
#   WORKER_SECRET   ARN of the one secret that the instance may read: a JSON object of settings of the worker
#   WORKER_IMAGE    the worker's image, in ECR of this account, or in a registry that asks for no password
#   AWS_REGION, AWS_URL_SUFFIX          where we are
#   LOG_GROUP       group of CloudWatch Logs for the worker's own log; empty: the journal
#   BUILDS_REACH    internet: builds reach no private address; network: they do. The metadata they never reach
#   MILLRACE_*      further settings of the worker
set -euo pipefail
umask 077
export HOME=${HOME:-/root}
: "${WORKER_SECRET:?}" "${WORKER_IMAGE:?}" "${AWS_REGION:?}" "${AWS_URL_SUFFIX:=amazonaws.com}" "${LOG_GROUP=}" "${BUILDS_REACH:=internet}"
metadata=http://169.254.169.254
secrets=${AWS_ENDPOINT_URL_SECRETS_MANAGER:-https://secretsmanager.$AWS_REGION.$AWS_URL_SUFFIX}
settings=/etc/millrace/worker.env

say() { echo "millrace: $*"; }

persist() { # persist WHAT COMMAND...: again and again, as networks and mirrors may come up later than we do
    local what=$1 try
    shift
    for try in 1 2 3 4 5 6 7 8; do
        if "$@"; then return 0; fi
        say "$what failed, try $try"
        sleep $((try * 2))
    done
    say "gave up: $what"
    return 1
}

fetch() { curl --silent --show-error --fail --max-time 10 "$@"; }

token() { fetch -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' "$metadata/latest/api/token"; }

look() { # look PATH: what the metadata says, by IMDSv2; the token goes in by standard input, as arguments are seen by all
    printf 'header = "X-aws-ec2-metadata-token: %s"\n' "$(token)" | fetch --config - "$metadata/latest/meta-data/$1"
}

install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -y -qq --no-install-recommends ca-certificates curl docker.io iproute2 iptables jq "$@"
}

role_keys() { # the role's keys for curl, as its --config
    local role
    role=$(look iam/security-credentials/) && [ -n "$role" ] || return 1
    look "iam/security-credentials/${role%%$'\n'*}" | jq --raw-output --exit-status '
        "user = \"\(.AccessKeyId):\(.SecretAccessKey)\"", "header = \"X-Amz-Security-Token: \(.Token)\""'
}

read_secret() { # the secret's text
    local keys
    keys=$(role_keys) || return 1
    fetch --config - --aws-sigv4 "aws:amz:$AWS_REGION:secretsmanager" \
        -H 'Content-Type: application/x-amz-json-1.1' -H 'X-Amz-Target: secretsmanager.GetSecretValue' \
        --data "$(jq --null-input --arg id "$WORKER_SECRET" '{SecretId: $id}')" "$secrets" <<<"$keys" |
        jq --raw-output --exit-status .SecretString
}

write_settings() { # what the worker knows; readable by root only
    local secret instance generation
    secret=$(persist "reading the secret" read_secret)
    instance=$(persist "reading the instance's id" look instance-id)
    generation=$(look tags/instance/millrace:generation 2>/dev/null || true) # none: before the farm first sized the group
    install -d -m 700 "${settings%/*}"
    {
        env | grep '^MILLRACE_' | sort
        echo "MILLRACE_WORKER_ID=$instance"
        echo "MILLRACE_NOTICES=ec2"
        echo "MILLRACE_DATA_DIR=/var/lib/millrace"
        echo "MILLRACE_WORK_DIR=/var/lib/millrace/work"
        echo "MILLRACE_LOG_FORMAT=json"
        if [ -n "$generation" ]; then echo "MILLRACE_GENERATION=$generation"; fi
        jq --raw-output 'to_entries[] | "\(.key)=\(.value)"' <<<"$secret"
    } >"$settings.new"
    if ! grep -q '^MILLRACE_WORKER_TOKEN=.' "$settings.new"; then
        say "the secret has no MILLRACE_WORKER_TOKEN"
        return 1
    fi
    mv "$settings.new" "$settings"
    instance_id=$instance
}

write_fence() { # what containers may not reach, put up again before each start of the worker, as Docker and reboots lose it
    install -d -m 755 /usr/local/sbin
    cat >/usr/local/sbin/millrace-fence <<'FENCE'
#!/bin/bash
# Keeps builds from the metadata, and from private addresses unless told otherwise; the resolver they may ask.
set -euo pipefail
chain=MILLRACE
iptables -w -N "$chain" 2>/dev/null || iptables -w -F "$chain"
resolvers=$({ cat /etc/resolv.conf /run/systemd/resolve/resolv.conf 2>/dev/null || true; } | sed -n 's/^nameserver \([0-9.]*\)$/\1/p' | sort -u)
for resolver in $resolvers; do
    iptables -w -A "$chain" -d "$resolver" -p udp --dport 53 -j RETURN
    iptables -w -A "$chain" -d "$resolver" -p tcp --dport 53 -j RETURN
done
iptables -w -A "$chain" -d 169.254.0.0/16 -j REJECT
if [ "${1:-internet}" = internet ]; then
    uplink=$(ip -4 route show default | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1)
    for private in 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10; do
        iptables -w -A "$chain" -o "${uplink:?there is no way out}" -d "$private" -m conntrack --ctstate NEW -j REJECT
    done
fi
iptables -w -C DOCKER-USER -j "$chain" 2>/dev/null || iptables -w -I DOCKER-USER -j "$chain"
FENCE
    chmod 755 /usr/local/sbin/millrace-fence
}

log_in() { # to ECR, by the role: Docker asks the helper each time, and nothing is kept
    case $WORKER_IMAGE in
        *.dkr.ecr.*)
            install -d -m 700 /root/.docker
            jq --null-input --arg registry "${WORKER_IMAGE%%/*}" '{credHelpers: {($registry): "ecr-login"}}' >/root/.docker/config.json
            ;;
    esac
}

write_unit() {
    local log="--log-driver journald"
    if [ -n "$LOG_GROUP" ]; then
        log="--log-driver awslogs --log-opt awslogs-region=$AWS_REGION --log-opt awslogs-group=$LOG_GROUP --log-opt awslogs-stream=$instance_id"
    fi
    install -d -m 755 /var/lib/millrace /var/lib/millrace/work
    cat >/etc/systemd/system/millrace-worker.service <<UNIT
[Unit]
Description=Worker of a Millrace farm
After=docker.service network-online.target
Requires=docker.service
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStartPre=/usr/local/sbin/millrace-fence $BUILDS_REACH
ExecStartPre=-/usr/bin/docker rm --force millrace-worker
# The two rights, and the sight of the host's processes, are for mounting layers of caches into builds. They make nobody mightier: whoever
# holds the engine's socket is root here anyway.
ExecStart=/usr/bin/docker run --name millrace-worker --rm --network host --pid host $log \\
  --cap-add SYS_ADMIN --cap-add SYS_PTRACE --security-opt apparmor=unconfined \\
  --env-file $settings --volume /var/run/docker.sock:/var/run/docker.sock --volume /var/lib/millrace:/var/lib/millrace \\
  $WORKER_IMAGE worker
ExecStop=-/usr/bin/docker stop --time 110 millrace-worker
TimeoutStopSec=120
# A worker that was asked to leave ends with 0, and is not wanted again: the farm then ends the instance.
Restart=on-failure
RestartSec=5

[Install]
WantedBy=multi-user.target
UNIT
    chmod 644 /etc/systemd/system/millrace-worker.service
}

say "installing Docker"
case $WORKER_IMAGE in
    *.dkr.ecr.*) persist "installing packages" install_packages amazon-ecr-credential-helper ;;
    *) persist "installing packages" install_packages ;;
esac
persist "starting Docker" systemctl enable --now docker.service
say "fetching $WORKER_IMAGE"
log_in
persist "fetching the image" docker pull --quiet "$WORKER_IMAGE"
write_settings
write_fence
write_unit
systemctl daemon-reload
systemctl enable --now millrace-worker.service
say "the worker is there"
