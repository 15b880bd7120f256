'use strict'

const express = require('express')

function makeApp () {
  const app = express()
  app.get('/hello/:name', (request, response) => response.json({ hello: request.params.name }))
  return app
}

module.exports = { makeApp }
