import errno
import os
import stat

import pytest

from iwm_fast.atomic_files import new_file, sync, whole_folder, write_whole_text
from iwm_fast.errors import UserError, because


def failing(monkeypatch, number, *, folders):
    """Make fsync of folders, or of files, fail; for a permission error, opening them too."""
    real_fsync, real_open = os.fsync, os.open

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        real_fsync(handle)

    def opened(path, flags, *rest, **more):
        if number == errno.EACCES and os.path.isdir(path) == folders:  # noqa: PTH112
            raise PermissionError(number, os.strerror(number))
        return real_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "open", opened)


@pytest.mark.parametrize("name", ["EINVAL", "EBADF", "ENOTSUP", "ENOSYS", "EACCES"])
def test_where_folders_cannot_be_synced_files_and_folders_are_written_all_the_same(name, tmp_path, monkeypatch):
    failing(monkeypatch, getattr(errno, name), folders=True)
    write_whole_text(tmp_path / "a.json", "{}")
    with whole_folder(tmp_path / "out") as partial:
        (partial / "b").touch()
    assert (tmp_path / "a.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "out"]


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EDQUOT"])
@pytest.mark.parametrize("folders", [True, False], ids=["folder", "file"])
def test_a_disk_that_is_full_or_fails_is_an_error_and_leaves_nothing_partial(name, folders, tmp_path, monkeypatch):
    failing(monkeypatch, getattr(errno, name), folders=folders)
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
        write_whole_text(tmp_path / "a.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == (["a.json"] if folders else [])


def test_a_file_that_may_not_be_read_is_not_synced_in_silence(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    failing(monkeypatch, errno.EACCES, folders=False)
    with pytest.raises(PermissionError):
        sync(tmp_path / "a")


CAUSES = {
    "ENOSPC": "No space left on device; free space there",
    "EROFS": "Read-only file system; mount it for writing",
    "EACCES": "Permission denied; check its owner and permissions",
    "EMFILE": "Too many open files; raise the limit of open files (ulimit -n)",
    "ENOENT": "No such file or directory",
}


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_has_its_own_advice(name):
    number = getattr(errno, name)
    assert because(OSError(number, os.strerror(number))) == CAUSES[name]


def test_a_new_file_appears_whole_or_not_at_all_and_replaces_nothing(tmp_path):
    with new_file(tmp_path / "deep" / "a") as file:
        file.write(b"whole")
        assert not (tmp_path / "deep" / "a").exists()
    assert (tmp_path / "deep" / "a").read_bytes() == b"whole"
    with pytest.raises(TypeError), new_file(tmp_path / "b") as file:
        file.write("no bytes")
    with pytest.raises(UserError, match="File exists"), new_file(tmp_path / "c"):
        (tmp_path / "c").write_bytes(b"first")
    assert (tmp_path / "c").read_bytes() == b"first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "deep"]


def test_a_new_file_takes_its_name_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refused(*_names):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with new_file(tmp_path / "a") as file:
        file.write(b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"
    with pytest.raises(UserError, match="File exists"), new_file(tmp_path / "a"):
        pass
