# Installs Debian packages (the arguments) as root, without starting their services: the tests start
# servers of their own. dpkg asks policy-rc.d before it starts a service, also without systemd.
set -eu
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

install() {
    apt-get install --yes --no-install-recommends -o DPkg::Lock::Timeout=120 "$@"
}

# The package lists may be absent, as in a fresh container, or name versions that are gone.
if ! install "$@"; then
    echo "xtask: updating the package lists and trying again"
    apt-get update -o DPkg::Lock::Timeout=120
    install "$@"
fi
