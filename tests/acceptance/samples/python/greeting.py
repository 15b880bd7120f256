from flask import Flask, jsonify

app = Flask(__name__)


@app.get("/hello/<name>")
def hello(name: str):
    return jsonify(hello=name)
