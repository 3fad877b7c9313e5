# The last step of the base image, run inside it by root; the same however the image is made.
set -eu
git config --system --replace-all safe.directory '*'  # The source is on a mount, and may belong to another user.
# apt keeps no packages and no indexes of them: both would only be copied into images made from this one.
cat > /etc/apt/apt.conf.d/90millrace <<'CONF'
Acquire::Languages "none";
Acquire::Retries "3";
APT::Install-Recommends "false";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
CONF
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb /var/log/apt /var/log/dpkg.log
mkdir -p /usr/share/man/man1  # Java's packages put links there and stumble where it is missing.
