// npm ci without the installing: node_modules is in place (see stash.py), the root project's scripts run.
// Everything else is npm's own: its settings, the environment of the scripts, its errors and exit status.
// Usage: node lifecycle.js NPM_DIRECTORY ARGUMENTS…
'use strict'

const npm = process.argv[2]
process.argv.splice(1, 2, npm + '/bin/npm-cli.js')

const CI = require(npm + '/lib/commands/ci.js')
const runScript = require(npm + '/node_modules/@npmcli/run-script')

CI.prototype.exec = async function () {
  const scriptShell = this.npm.config.get('script-shell') || undefined
  if (this.npm.config.get('ignore-scripts')) {
    return
  }
  for (const event of ['preinstall', 'install', 'postinstall', 'prepublish', 'preprepare', 'prepare', 'postprepare']) {
    await runScript({ path: this.npm.prefix, args: [], scriptShell, stdio: 'inherit', event })
  }
}

require(npm + '/lib/cli.js')(process)
