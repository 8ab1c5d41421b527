#!/usr/bin/env bash
# Put Debian's kernel for clouds where virtual machines find it (27 MB fetched, 110 MB on disk). Unpacked, not installed: an
# installed one would be this machine's own at its next start. Does nothing where there is one.
set -euo pipefail
place=/usr/lib/atoll/guest
[ "$(uname -m)" = x86_64 ] || exit 0
compgen -G "$place/boot/vmlinuz-*-cloud-*" > /dev/null && exit 0
compgen -G "/boot/vmlinuz-*-cloud-*" > /dev/null && exit 0
printf '==> the kernel for virtual machines\n' >&2
package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: //p' | head -n 1)
[ -n "$package" ] || { echo "error: apt knows no linux-image-cloud-amd64" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
(cd "$work" && apt-get download -qq "$package" > /dev/null 2>&1) || { echo "error: cannot fetch $package" >&2; exit 1; }
dpkg-deb -x "$work"/*.deb "$work/tree"
rm -rf "$place.next"
mkdir -p "$place.next/lib/modules" "$place.next/boot"
cp "$work"/tree/boot/vmlinuz-* "$place.next/boot/"
cp -r "$work"/tree/lib/modules/* "$place.next/lib/modules/"
rm -rf "$place"
mv "$place.next" "$place"
