"""Labels in lists: separators, tables of every layout, names in several Unicode forms, numbers, labels not known."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
import torch

PIL = pytest.importorskip("PIL.Image")

from sadcl.data.csv_list import CsvDataset  # noqa: E402
from sadcl.data.images import ImageFileError  # noqa: E402
from sadcl.data.json_lines import JsonLinesDataset  # noqa: E402
from sadcl.data.labels import check_compounds  # noqa: E402

SETS = [["rust", "scab"], ["rust"], ["scab"], ["healthy"], ["rust", "scab", "complex"], ["complex", "scab"]]
PAIRS_ALONE = [
    ["rust", "scab"],
    ["scab", "healthy"],
    ["rust", "healthy"],
    ["rust", "scab", "complex"],
    ["complex", "rust"],
]
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the working one, with pictures 0.png to 5.png."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        PIL.new("RGB", (4, 4)).save(f"{number}.png")
    return tmp_path


def table(content: str | bytes, **options: object) -> CsvDataset:
    Path("t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return CsvDataset("t.csv", 8, **options)  # type: ignore[arg-type]


def lines(*rows: object, **options: object) -> JsonLinesDataset:
    Path("l.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return JsonLinesDataset("l.jsonl", 8, **options)  # type: ignore[arg-type]


def matrix(dataset: CsvDataset | JsonLinesDataset) -> list[list[float]]:
    return torch.stack([dataset.labels(i) for i in range(len(dataset))]).tolist()


# -- what stands between labels --


@pytest.mark.parametrize("sets", [SETS, PAIRS_ALONE])
@pytest.mark.parametrize("separator", ["|", "\t", ",", ", ", "/", " ", "+", ";"])
def test_another_separator_is_named_and_can_be_set(separator: str, sets: list[list[str]]) -> None:
    """Also where no picture has one label alone (but for a blank, which is in names)."""
    content = "path,labels\n" + "".join(f'{i}.png,"{separator.join(s)}"\n' for i, s in enumerate(sets))
    setting = {"\t": "tab", " ": "space"}.get(separator, separator.strip())
    if separator not in ";" and not (separator == " " and sets is PAIRS_ALONE):
        word = setting if len(setting) > 1 else repr(setting)
        with pytest.raises(ValueError, match="t.csv: label .* looks like several, 'complex', '") as caught:
            table(content)
        assert f"label_separator (--data.label_separator) to {word}, or to ';' if it is one" in str(caught.value)
        assert len(table(content, label_separator=";").classes) > 4, "told so, they are names"
    for given in (setting, separator.strip() or separator):
        dataset = table(content, label_separator=given)
        assert dataset.classes == ("complex", "healthy", "rust", "scab")
        assert [sorted(dataset.classes[c] for c in row) for row in dataset.positive] == [sorted(s) for s in sets]


@pytest.mark.parametrize("sign", [*"-_.#~^>=*@\\", "\u00a0", "，", "、", "；", "؛"])
def test_any_sign_may_stand_between_labels(sign: str) -> None:
    """In other scripts, too: it does where the parts are labels, and one of each label's is one by itself."""
    content = "path,labels\n" + "".join(f"{i}.png,{sign.join(names)}\n" for i, names in enumerate(SETS))
    with pytest.raises(ValueError, match="t.csv: label .* looks like several, 'complex', ") as caught:
        table(content)
    assert f"label_separator (--data.label_separator) to {sign!r}, or to ';' if it is one" in str(caught.value)
    assert table(content, label_separator=sign).classes == ("complex", "healthy", "rust", "scab")
    with pytest.raises(ValueError, match="several of them if label_separator .* is " + re.escape(repr(sign))):
        table(content, classes=("complex", "healthy", "rust", "scab"))
    alone = ["t-shirt", "shirt", "ping-pong", "St. Bernard", "a_b", "a_c", "d_b", "d_c"]
    check_compounds(alone, "t.csv")


def test_tags_that_never_stand_alone_are_seen_by_their_number() -> None:
    words = ["clear", "haze", "water", "road", "crops"]
    tags = [f"primary {a} {b}" for a in words for b in words if a < b] + [f"primary {a}" for a in words]
    with pytest.raises(ValueError, match="label_separator .* to space"):
        check_compounds(tags, "t.csv")


@pytest.mark.parametrize("separator", [" ", ", "])
def test_numbers_side_by_side_are_several(separator: str) -> None:
    with pytest.raises(ValueError, match=r"label '0\D+16' looks like several, '0', '16'; set label_separator"):
        table(f'Id,Target\n0,"0{separator}16"\n1,"1{separator}2{separator}7"\n2,5\n')


@pytest.mark.parametrize(
    "names",
    [
        ["dog", "hot dog", "bear", "teddy bear", "stop sign", "traffic light"],
        ["red car", "red bus", "blue car", "blue bus"],
        ["great white shark, white shark", "tiger shark, Galeocerdo cuvieri", "hen", "cock"],
        ["vehicle", "vehicle/car", "vehicle/bus", "animal/cat"],
        ["I/O", "R&D", "C++", "12:30", "a - b"],
        ["street light", "street", "light", "hot dog", "tennis court", "fire hydrant", "stop sign"],
    ],
)
def test_names_of_several_words_are_names(names: list[str]) -> None:
    check_compounds(names, "t.csv")
    assert set(table("".join(f'{i % 6}.png,"{name}"\n' for i, name in enumerate(names))).classes) == set(names)


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("['rust', 'scab']", ["rust", "scab"]),
        ('["rust", "scab"]', ["rust", "scab"]),
        ("['rust' 'scab']", ["rust", "scab"]),
        ("('rust', 'scab')", ["rust", "scab"]),
        ("{'rust'}", ["rust"]),
        ("[]", []),
        ("[3, 12]", ["3", "12"]),
        ("[3.0, 12.0]", ["3", "12"]),
        ("[None]", []),
        ("set()", []),
        ("frozenset({'rust', 'scab'})", ["rust", "scab"]),
        ("array(['rust', 'scab'], dtype=object)", ["rust", "scab"]),
        ("array(['rust' 'scab'])", ["rust", "scab"]),
        ("set(x)", ["set(x)"]),
        ("['a;b', 'it''s']", ["a;b", "its"]),
        ("(rust)", ["(rust)"]),
        ("[other]", ["[other]"]),
    ],
)
def test_lists_as_programs_print_them(cell: str, names: list[str]) -> None:
    quoted = cell.replace('"', '""')
    dataset = table(f'path,labels\n0.png,"{quoted}"\n1.png,x\n', label_separator=None)
    assert {dataset.classes[c] for c in dataset.positive[0]} == set(names)


def test_a_list_that_no_program_prints_is_refused() -> None:
    with pytest.raises(ImageFileError, match=r"line 2: .* got \[rust, scab\]; see label_separator"):
        table('path,labels\n0.png,"[rust, scab]"\n')


@pytest.mark.parametrize("separator", ["|", " ", ",", ";"])
def test_a_wrong_separator_is_named_where_the_classes_are_known(separator: str) -> None:
    other = ";" if separator != ";" else "|"
    with pytest.raises(ValueError, match=r"line 1: label .* several of them if label_separator .* is"):
        table(f'0.png,"dog{separator}cat"\n', classes=("cat", "dog"), label_separator=other)


# -- tables --

TABLES = {
    "semicolons": "path;labels\n0.png;cat\n1.png;dog\n",
    "semicolons, quoted labels": 'path;labels\n0.png;"cat"\n1.png;"dog;dog"\n',
    "semicolons, no header": "0.png;cat\n1.png;dog\n",
    "tabs": "0.png\tcat\n1.png\tdog\n",
    "tabs and header": "image\ttags\n0.png\tcat\n1.png\tdog\n",
    "bars": "path|labels\n0.png|cat\n1.png|dog\n",
    "bars, no header": "0.png|cat\n1.png|dog\n",
    "blanks": "0.png cat\n1.png dog\n",
    "names in one word": "ImageID,Label\n0.png,cat\n1.png,dog\n",
    "one-hot of decimal commas": "file;cat;dog\n0.png;1,0;0,0\n1.png;0,0;1,0\n",
    "sep= in quotes": '"sep=;"\n0.png;cat\n1.png;dog\n',
    "sep=": "sep=,\n0.png,cat\n1.png,dog\n",
    "sep=;": "sep=;\r\nfile_name;labels\r\n0.png;cat\r\n1.png;dog\r\n",
    "index of pandas": ",path,labels\n0,0.png,cat\n1,1.png,dog\n",
    "index and another order": "Unnamed: 0,label,File Name\n0,cat,0.png\n1,dog,1.png\n",
    "names without suffix": "image_id,label\n0,cat\n1,dog\n",
    "other ends of names": "Image Index,Finding Labels,Age\n0.png,cat,60\n1.png,dog,30\n",
    "a column more": "filename,split,class\n0.png,train,cat\n1.png,train,dog\n",
    "trailing commas": "0.png,cat,,\n1.png,dog,,\n,,,\n",
    "carriage returns": "0.png,cat\r1.png,dog\r",
    "one-hot": "path,cat,dog\n0.png,1,0\n1.png,0,1\n",
    "one-hot in words": "Image,cat,dog\n0.png,True,False\n1.png,False,True\n",
    "one-hot of floats": ",image,cat,dog\n0,0.png,1.0,0.0\n1,1.png,0.0,1.0\n",
    "one-hot, blank is absent": "image,cat,dog\n0.png,1,\n1.png,,1\n",
    "one-hot beside other figures": "path,width,cat,dog\n0.png,640,1,0\n1.png,480,0,1\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("layout", TABLES)
def test_tables_of_every_layout(layout: str, encoding: str) -> None:
    dataset = table(TABLES[layout].encode(encoding))
    assert dataset.classes == ("cat", "dog") and matrix(dataset) == [[1, 0], [0, 1]]
    assert [Path(path).name for path in dataset.paths] == ["0.png", "1.png"]
    passed_over = {"a column more": "split", "one-hot beside other figures": "width", "other ends of names": "Age"}.get(
        layout
    )
    assert ("columns passed over: " + str(passed_over) in dataset.summary()) == (passed_over is not None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0.png,cat,dog\n", r"line 1: expected `path,label;label`, or a first line that names .*got 3 columns"),
        ("path,l1,l2\n0.png,cat,dog\n", r"line 1: no column is called labels, and 'l1', 'l2' do not hold 0, 1"),
        ("path,labels\n0.png,cat,dog\n", r"line 2: expected 2 columns as in the header, got 3"),
        ("path,labels\n,cat\n", r"line 2: no path of a picture"),
        ("0.png,Bäume\n".encode("cp1252"), r"line 1: not UTF-8 .*; save the file as UTF-8"),
        ("0.png,cat\n".encode("utf-16-le"), r"zero bytes: UTF-16 without a byte order mark"),
        ("path\n0.png\n", r"no picture has a label \(line 2 is '0.png'\)"),
        ("0.png^cat\n", r"no picture has a label \(line 1 is '0.png\^cat'\)"),
        ("snap,species\n0.png,cat\n", r"line 1: 'snap', 'species': no column is called path, filename, image"),
        ("image file name,labels\n0.png,cat\n", r"line 1: 'image file name', 'labels': no column is called path"),
        ("0.png traffic light\n", r"line 1: expected `path,label;label`"),
        ("0.png\t0\t1\t0\n", r"line 1: 0 and 1 are no labels"),
        ("path,labels,unknown\n0.png,a;b,b\n", r"line 2: label 'b' is both listed and unknown"),
    ],
)
def test_other_tables_are_refused_in_one_line(content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        table(content)
    assert str(caught.value).startswith("t.csv: ") and "\n" not in str(caught.value)


# -- names --


def test_names_are_compared_in_one_unicode_form() -> None:
    dataset = table(f"0.png,{NFC}\n1.png,{NFD}\n")
    assert dataset.classes == (NFC,) and matrix(dataset) == [[1], [1]]
    assert table(f"0.png,{NFD}\n", classes=(NFC,)).classes == (NFC,)
    assert table(f"0.png,{NFC}\n", classes=(NFD,)).positive == [(0,)], "as in a checkpoint of before"
    assert lines({"path": "0.png", "labels": [NFD]}, {"path": "1.png", "labels": [NFC]}).classes == (NFC,)
    with pytest.raises(ValueError, match="occurs twice"):
        table(f"0.png,{NFD}\n", classes=(NFC, NFD))


@pytest.mark.parametrize(
    ("name", "known", "words"),
    [
        ("dog\u200b", "dog", r"'dog\u200b' is not 'dog'"),
        ("traffic\u00a0light", "traffic light", r"'traffic\xa0light' is not 'traffic light'"),
        ("d\u043eg", "dog", r"'d\u043eg' is not 'dog'"),
        ("Dog", "dog", "the nearest is 'dog'"),
        ("traffic_light", "traffic light", "the nearest is 'traffic light'"),
    ],
)
def test_names_that_look_alike_are_shown_with_escapes(name: str, known: str, words: str) -> None:
    with pytest.raises(ValueError, match="line 1: label .* is not one of the classes: ") as caught:
        table(f"0.png,{name}\n", classes=(known, "something else"))
    assert str(caught.value).endswith(words)


def test_doubtful_classes_are_said() -> None:
    summary = table("0.png,Dog\n1.png,dog\n2.png,cat\n3.png,cat\u200b\n4.png,nan\n").summary()
    assert "classes that look alike: " in summary and "'Dog' and 'dog'" in summary
    assert r"'cat' and 'cat\u200b'" in summary and "class 'nan': pandas" in summary
    assert r"'cat' and 'c\u0430t'" in table("0.png,cat\n1.png,c\u0430t\n").summary()
    assert "'01' and '1' and '1.0'" in table("0.png,1;01\n1.png,1.0\n").summary()
    assert "alike" not in table("0.png,dog\n1.png,cat\n").summary()


def test_numbers_are_in_their_order() -> None:
    numbers = ("-1.5", "0", "1", "2", "10", "27")
    assert table("0.png,0;1;2\n1.png,10;-1.5\n2.png,27\n").classes == numbers
    assert lines({"path": "0.png", "labels": [10, 2.0]}, {"path": "1.png", "labels": ["1"]}).classes == ("1", "2", "10")
    assert table("0.png,10;9\n1.png,a\n").classes == ("10", "9", "a"), "not all of them are numbers"


# -- labels that are not known --


@pytest.mark.parametrize("key", ["unknown", "uncertain", "ignored"])
def test_unknown_labels_of_lists(key: str) -> None:
    rows = [[0.0, 1.0, -1.0], [1.0, 0.0, 0.0]]
    for dataset in (
        table(f"path,labels,{key}\n0.png,b,c\n1.png,a,\n"),
        lines({"path": "0.png", "labels": ["b"], key: ["c"]}, {"path": "1.png", "labels": ["a"], key: None}),
        lines({"path": "0.png", "labels": {"a": 0, "b": 1, "c": -1}}, {"path": "1.png", "labels": {"a": True}}),
        lines({"path": "0.png", "labels": {"b": 1, "c": None}}, {"path": "1.png", "labels": {"a": 1, "b": False}}),
        table("path,a,b,c\n0.png,0,1,-1\n1.png,1,0,0\n"),
        table("path,a,b,c\n0.png,0,1,\n1.png,1,0,0\n"),
    ):
        assert dataset.classes == ("a", "b", "c") and matrix(dataset) == rows
        assert "ignored: 1 labels of 1 images, not known to be there or absent" in dataset.summary()
        assert dataset.fingerprint() != table("0.png,b\n1.png,a;c\n").fingerprint()


@pytest.mark.parametrize("word", ["nan", "NaN", "NA", "null", "None"])
def test_words_for_nothing_are_blanks(word: str) -> None:
    assert matrix(table(f"path,cat,dog\n0.png,1,{word}\n1.png,{word},0\n")) == [[1, -1], [-1, 0]]
    assert matrix(table(f"path,cat,dog\n0.png,1,{word}\n1.png,{word},1\n")) == [[1, 0], [0, 1]]


def test_what_is_not_listed_is_absent_and_said_to_be() -> None:
    dataset = table("0.png,b\n1.png,a\n")
    assert matrix(dataset) == [[0, 1], [1, 0]] and dataset.annotated
    assert "labels that a picture is not listed with are absent" in dataset.summary()
    unknown = table("path,a,b\n0.png,-1,-1\n1.png,-1,-1\n")
    assert not unknown.annotated and "nothing can be measured here" in unknown.summary()
    assert len(table("path,a,b\n0.png,-1,-1\n1.png,0,0\n", empty_images="drop")) == 1, "unknown is not empty"


@pytest.mark.parametrize("labels", [{"a": 2}, {"a": "1"}, {"": 1}, {"a": [1]}, [True], [["a"]], [0, 1, 1], "a", None])
def test_wrong_labels_in_json_lines_are_refused(labels: object) -> None:
    with pytest.raises(ImageFileError, match=r"l.jsonl: line 1: expected .*, got label"):
        lines({"path": "0.png", "labels": labels})


def test_json_lines_take_a_separator_too() -> None:
    rows = [{"path": "0.png", "labels": "a|b"}, {"path": "1.png", "labels": ["c"]}]
    assert matrix(lines(*rows, label_separator="|")) == [[1, 1, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match="label 'a|b' looks like several"):
        lines({"path": "0.png", "labels": ["a|b"]})
