"""The last program of a bake reads files up to its limit."""

from images import settle


def test_files_are_read_until_the_limit(tmp_path):
    for number in range(4):
        (tmp_path / f"f{number}").write_bytes(bytes(1000))
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "f0")
    assert settle.read_files([f"{tmp_path}/**"], 10_000) == (4, 4000, 0)
    assert settle.read_files([f"{tmp_path}/**"], 2500) == (2, 2000, 2)
    assert settle.read_files([f"{tmp_path}/nothing*"], 2500) == (0, 0, 0)


def test_figures_of_this_host_are_bytes():
    assert settle.meminfo("MemTotal") > 1 << 20
    assert settle.meminfo("NoSuchThing") == 0
