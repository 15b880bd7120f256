from greeting import app


def test_greets_by_name():
    assert app.test_client().get("/hello/microvm").get_json() == {"hello": "microvm"}
