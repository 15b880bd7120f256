'use strict'

const test = require('node:test')
const assert = require('node:assert')

const { makeApp } = require('./server.js')

test('greets by name', async () => {
  const server = makeApp().listen(0, '127.0.0.1')
  try {
    const answer = await fetch(`http://127.0.0.1:${server.address().port}/hello/microvm`)
    assert.deepStrictEqual(await answer.json(), { hello: 'microvm' })
  } finally {
    server.close()
  }
})
