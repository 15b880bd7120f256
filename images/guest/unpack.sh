#!/bin/sh
# Runs in the guest during a bake, as the job's user: a commit into the work folder, from a tar of a .git directory.
#
#   unpack.sh DIRECTORY TAR COMMIT BRANCH URL
#
# The first time the tar's .git becomes the work folder's. After that (a re-bake on the previous parent) the commit is
# fetched from the tar into what is there: ignored files, such as installed packages, stay.
# Afterwards everything is as actions/checkout wants to find it: see images/warm_guest.py.
set -eu
directory=$1 tar=$2 commit=$3 branch=$4 url=$5
export GIT_TERMINAL_PROMPT=0 GIT_CONFIG_NOSYSTEM=1 GIT_LFS_SKIP_SMUDGE=1 LC_ALL=C.UTF-8

mkdir -p "$directory"
cd "$directory"
if [ -d .git ] && [ "$(git config --local --get remote.origin.url)" = "$url" ]; then
    from=$(mktemp -d)
    tar -xf "$tar" -C "$from"
    git -C "$from" config uploadpack.allowAnySHA1InWant true
    rm -f .git/index.lock .git/shallow.lock
    git fetch -q --no-tags --no-recurse-submodules --depth=1 "file://$from/.git" "$commit"
    rm -rf "$from"
else
    find . -mindepth 1 -delete
    tar -xf "$tar"
    rm -rf .git/hooks .git/logs
fi
git config --local remote.origin.url "$url"
git config --local remote.origin.fetch '+refs/heads/*:refs/remotes/origin/*'
git config --local gc.auto 0
git -c advice.detachedHead=false checkout -q --force --detach "$commit"
git clean -q -ffd
# No local branches, as a checkout leaves none in the way. The other two are what a job's fetch counts on having.
git for-each-ref --format='delete %(refname)' refs/heads refs/remotes | git update-ref --stdin
git update-ref "refs/remotes/origin/$branch" "$commit"
git update-ref refs/microvm/parent "$commit"
rm -f .git/FETCH_HEAD .git/ORIG_HEAD
