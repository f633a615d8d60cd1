"""train.export_onnx writes what fast.onnx_export makes of a checkpoint, and over nothing of the user's."""

import fast
from train import export_onnx
from train.common.errors import run_command


def exported(monkeypatch):
    """Replace the export, which takes seconds, by one that notes what it is asked for."""
    calls = []
    monkeypatch.setattr(export_onnx, "export_onnx", lambda *arguments: calls.append(arguments) or b"onnx")
    return calls


def test_what_is_exported(monkeypatch, tmp_path, capsys):
    calls, out = exported(monkeypatch), tmp_path / "a.onnx"
    for weights, *more in (["digits"], ["nuclei", "--size", "64", "96", "--positions"], ["nuclei", "--features"]):
        assert run_command(export_onnx.main, [weights, *more, "--out", str(out)]) == 0
    assert out.read_bytes() == b"onnx" and "opset 18) in" in capsys.readouterr().out
    (digits, size, classes, *_, positions), (nuclei, *given), (backbone, *rest) = calls
    assert (type(digits), size, len(classes), positions) == (fast.AutoFocusFormer, (64, 64), 10, False)
    assert given[:2] == [(64, 96), fast.pretrained_facts("nuclei")["classes"]] and given[-1] is True
    assert backbone.features_only and rest[:2] == [(128, 128), None]
    whole = fast.create_segmenter(pretrained="nuclei").backbone.state_dict()
    assert all(w.equal(whole[name]) for name, w in backbone.state_dict().items())


def test_what_is_refused(monkeypatch, tmp_path, capsys):
    exported(monkeypatch)
    (tmp_path / "mine.onnx").write_bytes(b"mine")
    for arguments, message in (
        (["digits", "--out", str(tmp_path / "mine.onnx")], "mine.onnx exists and was not written by this command"),
        (["none_such"], "none_such"),
    ):
        assert run_command(export_onnx.main, arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert (tmp_path / "mine.onnx").read_bytes() == b"mine"
    monkeypatch.undo()
    assert run_command(export_onnx.main, ["digits", "--size", "16", "16", "--out", str(tmp_path / "b.onnx")]) == 2
    assert "size must be at least 32 x 32 pixels, not 16 x 16" in capsys.readouterr().err
