"""Which of many files is the scan: contrasts, outputs of programs, links, formats, DICOM series."""

import gzip
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from test_scans import VOXEL, head, left_out, manifest, needs_converter, write, write_dicom

from config import UserError
from dataset import find_slices
from participants.names import stem
from scans.finding import contrast_of, derived, find_volumes
from scans.slicing import by_reason, import_scans
from scans.volumes import ImportOptions, choose_series, find_converter, open_volume, read_volume
from utils import is_dicom


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def find(root: Path, contrast: str = "T1w", pattern: str = "*") -> tuple[set[str], dict[str, str]]:
    """The paths inside a folder that are found, and the reasons for the others."""
    problems: dict[str, str] = {}
    found = find_volumes(root, pattern, contrast, problems)
    return {str(path.relative_to(root)) for path in found}, problems


# Contrasts


BIDS_NAMES = [
    "anat/sub-1_T1w.nii.gz", "anat/sub-1_FLAIR.nii.gz", "anat/sub-1_T2w.nii.gz",
    "fmap/sub-1_phasediff.nii.gz", "perf/sub-1_asl.nii.gz", "perf/sub-1_m0scan.nii.gz",
    "func/sub-1_task-rest_bold.nii.gz", "anat/sub-1_part-phase_T1w.nii.gz",
]  # fmt: skip


def test_of_a_bids_tree_only_the_wanted_contrast_is_found(tmp_path: Path):
    touch(tmp_path / "sub-1", *BIDS_NAMES)
    touch(tmp_path, "sourcedata/sub-1/x.nii", "derivatives/fs/sub-1/y_T1w.nii", "code/z.nii")
    found, problems = find(tmp_path)
    assert found == {"sub-1/anat/sub-1_T1w.nii.gz"}
    assert problems == {
        "sub-1/anat/sub-1_FLAIR.nii.gz": "contrast FLAIR (--contrast)",
        "sub-1/anat/sub-1_T2w.nii.gz": "contrast T2w (--contrast)",
        "sub-1/fmap/sub-1_phasediff.nii.gz": "in folder fmap",
        "sub-1/perf/sub-1_asl.nii.gz": "contrast asl (--contrast)",
        "sub-1/perf/sub-1_m0scan.nii.gz": "contrast m0scan (--contrast)",
        "sub-1/func/sub-1_task-rest_bold.nii.gz": "contrast bold (--contrast)",
        "sub-1/anat/sub-1_part-phase_T1w.nii.gz": "phase image",
        "sourcedata/sub-1/x.nii": "in folder sourcedata",
        "derivatives/fs/sub-1/y_T1w.nii": "in folder derivatives",
        "code/z.nii": "in folder code",
    }
    assert find(tmp_path, "FLAIR")[0] == {"sub-1/anat/sub-1_FLAIR.nii.gz"}
    everything, problems = find(tmp_path, "any")
    assert len(everything) == 6 and set(problems.values()) == {
        "phase image", "in folder fmap", "in folder sourcedata", "in folder derivatives",
        "in folder code",
    }  # fmt: skip


def test_a_bids_tree_is_imported_without_the_other_contrasts(tmp_path: Path, capsys):
    values, affine = head()
    for i in range(4):
        anat = tmp_path / "bids" / f"sub-{i}" / "anat"
        write(anat / f"sub-{i}_T1w.nii", values, affine)
        touch(anat, *(f"sub-{i}_{other}.nii" for other in ("FLAIR", "T2w")))
    rows = "".join(f"sub-{i}\t{'AC'[i % 2]}\n" for i in range(4))
    (tmp_path / "bids" / "participants.tsv").write_text("participant_id\tgroup\n" + rows)
    table = tmp_path / "bids" / "participants.tsv"
    options = ImportOptions(tmp_path / "bids", tmp_path / "out", table, slices=2, size=64)
    import_scans(options)
    assert [row["id"] for row in manifest(options.out)] == [f"sub-{i}_T1w" for i in range(4)]
    out = capsys.readouterr().out
    assert "4 x contrast FLAIR (--contrast): sub-0/anat/sub-0_FLAIR.nii, sub-1/" in out
    with pytest.raises(UserError, match="no NIfTI .*; left out: 4 x contrast FLAIR .*; 4 x contr"):
        import_scans(replace(options, contrast="PDw", out=tmp_path / "pd"))
    with pytest.raises(UserError, match=r"contrast = T1: must be one of any, FLAIR, "):
        replace(options, contrast="T1")
    assert not (tmp_path / "pd").exists()


@pytest.mark.parametrize(
    ("path", "contrast"),
    [
        ("sub-1_ses-T2_t1W.nii", "T1w"), ("T1w.nii.gz", "T1w"), ("x_INPLANEt2.img", "inplaneT2"),
        ("002_S_0295/MP-RAGE/2006/I13722", "T1w"), ("AD/x_mprage1.nii", "T1w"),
        ("a/IR-SPGR/I1", "T1w"), ("a/3D_BRAVO/I1", "T1w"), ("a/Axial_T2-FLAIR/I1", "FLAIR"),
        ("a/AXIAL_PD_T2_FSE/I3", "T2w"), ("a/Axial T2 Star/I3", "T2starw"),
        ("T2*_x.nii", "T2starw"),
        ("a/Field_Mapping/I4", "fieldmap"), ("a/3_Plane_Localizer/I5", "localizer"),
        ("a/Axial_DTI/I6", "dwi"), ("a/ASL_PERFUSION/I6", "asl"), ("AAHead_Scout/1", "localizer"),
        ("T1w/T2w_acpc.nii", "T2w"), ("FLAIR_study/a/mprage.nii", "T1w"), ("a/SWI/1", "T2starw"),
        ("FLAIR_study/MPRAGE/x.nii", "T1w"), ("MPRAGE_study/FLAIR/x.nii", "FLAIR"),
        # these say nothing
        ("T2/PD/T1/scan.nii", ""), ("sub-PD_T1.nii", ""), ("PD_001.nii", ""), ("x_T2.nii", ""),
        ("ADC01/x.nii", ""), ("aslan/x.nii", ""), ("swiss/scan.nii", ""), ("leobold/x.nii", ""),
        ("MPR__GradWarp__B1_Correction/I7", ""), ("OAS1_0001_MR1_mpr-1_anon.img", ""),
        ("fmri_study/x.nii", ""), ("x_t1wi.nii", ""), ("episode/1.nii", ""),
    ],
)  # fmt: skip
def test_a_name_tells_its_contrast_only_beyond_doubt(path, contrast):
    assert contrast_of(Path(path)) == contrast


# Outputs of other programs


SPM = ["c1X", "mwp1X", "wmX", "y_X", "rc1X", "mX", "swrX", "s8wX", "wc2X", "smwc1X", "p0X", "meanX"]
FSL = ["X_brain", "X_restore", "X_brain_restore", "X_pve_0", "X_to_MNI_lin", "X_bet", "X_mixeltype"]
MASKS = [
    "X_seg",
    "X_brain_mask",
    "X_brain_pve_0_mask",
    "X_dseg",
    "X_label-GM_probseg",
    "brainmask2",
]


def test_outputs_beside_a_scan_are_left_out(tmp_path: Path):
    names = [name.replace("X", "sub-1_T1w") for name in SPM + FSL + MASKS]
    touch(tmp_path / "AD" / "a", "sub-1_T1w.nii", *(f"{name}.nii.gz" for name in names))
    touch(tmp_path / "AD" / "a" / "mri", *(f"{name}.nii" for name in names[:5]))
    found, problems = find(tmp_path, "any")
    assert found == {"AD/a/sub-1_T1w.nii", "AD/a/brainmask2.nii.gz"}
    reasons = list(problems.values())
    assert reasons.count("output of SPM or CAT12") == len(SPM) + 5
    assert reasons.count("output of FSL") == len(FSL)
    assert reasons.count("mask or segmentation") == len(MASKS) - 1


def test_a_name_that_could_be_a_scan_is_kept_without_its_origin(tmp_path: Path):
    scans = ["c1_001", "m01", "s02", "w3", "r1", "rc1", "p0a", "y_4", "x_brain", "y_restore", "wmX"]
    scans.append("a_N4BiasFieldCorrected")
    touch(tmp_path / "NC", *(f"{name}.nii" for name in scans))
    found, problems = find(tmp_path)
    assert len(found) == len(scans) and not problems
    touch(tmp_path / "NC", "01.nii", "x.nii")  # now two of them are outputs
    assert find(tmp_path)[1] == {
        "NC/m01.nii": "output of SPM or CAT12", "NC/x_brain.nii": "output of FSL",
    }  # fmt: skip
    assert "NC/x_brain.nii" in find(tmp_path, pattern="*_brain*")[0]  # asked for by its name


@pytest.mark.parametrize(
    "name",
    ["mwp1a", "rc1a", "wc1a", "a_seg", "a_pve_0", "a_mask", "aseg", "T1wDividedByT2w", "BiasField"],
)
def test_some_outputs_are_known_without_their_scan(name):
    assert derived(name, ()) and not derived(name[1:-2] + "zz", ())


def test_of_a_subject_of_freesurfer_only_orig_is_the_scan(tmp_path: Path):
    names = ("orig", "T1", "nu", "norm", "brainmask", "aseg", "aparc+aseg", "orig/001", "wm")
    touch(tmp_path / "bert" / "mri", *(f"{name}.mgz" for name in names))
    touch(tmp_path / "bert", "surf/lh.thickness.mgh", "label/aparc.nii.gz")
    touch(tmp_path / "mri", "sub-01.mgz", "sub-02.mgz", "aparc+aseg.nii.gz")  # no such subject
    found, problems = find(tmp_path)
    assert found == {"bert/mri/orig.mgz", "mri/sub-01.mgz", "mri/sub-02.mgz"} | {
        "bert/label/aparc.nii.gz"
    }
    assert set(problems.values()) == {"output of FreeSurfer"} and len(problems) == 10
    assert find(tmp_path, pattern="norm.mgz")[0] == {"bert/mri/norm.mgz"}


@pytest.mark.parametrize(("labels", "kept"), [(2, False), (32, False), (33, True), (200, True)])
def test_a_label_volume_is_known_by_its_values(tmp_path: Path, labels, kept):
    values, affine = head(100)
    rng = np.random.default_rng(labels)
    values = np.where(values > 0, rng.integers(1, labels, values.shape), 0).astype(np.float32)
    path = write(tmp_path / "a.nii", values, affine)
    if kept:
        assert read_volume(path, False)[0].shape == values.shape
        return
    with pytest.raises(ValueError, match="a segmentation: it holds few values"):
        read_volume(path, False)
    read_volume(write(path, values * 0.37, affine), False)  # not whole numbers


# Links


def test_folders_are_followed_through_links_each_once(tmp_path: Path):
    root, away = tmp_path / "scans", tmp_path / "away"
    for i in range(6):
        touch(root / "AD", f"s{i}/scan.nii")
        touch(away, f"s{i + 6}/scan.nii")
        (root / "AD" / f"s{i + 6}").symlink_to(away / f"s{i + 6}")
    touch(away / "nc", "t1/scan.nii")
    (root / "NC").symlink_to(away / "nc")
    (away / "nc" / "loop").symlink_to(root / "NC")
    (root / "up").symlink_to(tmp_path)
    (root / "AD" / "a_latest").symlink_to("s3")  # before s3 in the alphabet
    (root / "AD" / "gone").symlink_to(tmp_path / "nothing")
    (root / "AD" / "s0" / "copy.nii").symlink_to("scan.nii")
    (root / "self").symlink_to("self")
    found, problems = find(root)
    assert found == {f"AD/s{i}/scan.nii" for i in range(12)} | {"NC/t1/scan.nii"}
    assert problems == {
        "NC/loop": "the same folder as NC", "up": "the same folder as .",
        "AD/a_latest": "the same folder as AD/s3", "AD/gone": "dead link", "self": "dead link",
        "AD/s0/copy.nii": "the same file as AD/s0/scan.nii",
    }  # fmt: skip


def test_a_link_to_what_is_left_out_or_hidden_is_the_scan(tmp_path: Path):
    touch(tmp_path, "sourcedata/s1/a.nii", ".store/b.nii", "sourcedata/s2/c.nii")
    (tmp_path / "AD").mkdir()
    (tmp_path / "AD" / "s1").symlink_to("../sourcedata/s1")
    (tmp_path / "AD" / "b.nii").symlink_to("../.store/b.nii")
    (tmp_path / "AD" / "c.nii").symlink_to("../sourcedata/s2/c.nii")
    found, problems = find(tmp_path)
    assert found == {"AD/s1/a.nii", "AD/b.nii", "AD/c.nii"}
    assert problems == {
        "sourcedata/s1": "the same folder as AD/s1",
        "sourcedata/s2/c.nii": "in folder sourcedata",
    }


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path):
    touch(tmp_path, "a/x.nii", "b/y.nii")
    (tmp_path / "b").chmod(0)
    found, problems = find(tmp_path)
    (tmp_path / "b").chmod(0o700)
    assert found == {"a/x.nii"} and problems == {"b": "cannot be read: Permission denied"}


# Formats


def mark(values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Where the bright mark of `head` lies in mm from the middle of the volume."""
    middle = affine[:3, :3] @ (np.array(values.shape) - 1) / 2 + affine[:3, 3]
    return affine[:3, :3] @ np.argwhere(values > 130).mean(0) + affine[:3, 3] - middle


EXPECTED = [-40, 50, 10]  # mm: left, front, top


def test_formats_are_found_once_and_by_one_name(tmp_path: Path):
    touch(
        tmp_path / "AD", "a.hdr", "a.img", "b.HDR", "b.IMG", "c.par", "c.rec", "d+orig.HEAD",
        "d+orig.BRIK.gz", "e.mgz", "f.mnc", "g.nii", "h.hdr", "readme.txt", "HEAD", "i.json",
    )  # fmt: skip
    found, problems = find(tmp_path)
    names = {name.removeprefix("AD/") for name in found}
    assert names == {
        "a.img", "b.IMG", "c.rec", "d+orig.BRIK.gz", "e.mgz", "f.mnc", "g.nii", "h.hdr",
    }  # fmt: skip
    assert {stem(name) for name in names} == {"a", "b", "c", "d+orig", "e", "f", "g", "h"}
    assert not problems and stem("x.mgh") == "x" and stem("x.7.img.gz") == "x.7"


@pytest.mark.parametrize("codes", ["RAS", "LIA"])
@pytest.mark.parametrize("kind", ["a.mgz", "a.mgh", "pair.img", "a.nii.gz", "two.nii"])
def test_formats_with_orientation_are_read(tmp_path: Path, kind, codes):
    values, affine = head()
    volume = nibabel.load(write(tmp_path / "first" / "x.nii", values, affine, codes))
    made = {".mg": nibabel.MGHImage, "img": nibabel.Nifti1Pair, "two": nibabel.Nifti2Image}
    key = next((key for key in made if key in kind), None)
    own = made.get(key, nibabel.Nifti1Image)(volume.get_fdata(dtype="f4"), volume.affine)
    own.to_filename(tmp_path / kind)
    np.testing.assert_allclose(mark(*read_volume(tmp_path / kind, False)), EXPECTED, atol=3)


# How a scanner's axes lie in x, y, z for each value of orient, as in OASIS-1 (2)
AXES_OF_ORIENT = {0: "LAS", 1: "LSA", 2: "ASL"}


@pytest.mark.parametrize("orient", [0, 1, 2, 3])
@pytest.mark.parametrize("form", ["AnalyzeImage", "Spm2AnalyzeImage"])
def test_analyze_needs_consent_and_follows_its_orient(tmp_path: Path, orient, form):
    values, affine = head()
    codes = AXES_OF_ORIENT.get(orient, "LAS")
    turned = nibabel.load(write(tmp_path / "x.nii", values, affine, codes))
    kind = {"AnalyzeImage": nibabel.AnalyzeImage, "Spm2AnalyzeImage": nibabel.Spm2AnalyzeImage}
    volume = kind[form](turned.get_fdata(dtype="f4"), None)
    volume.header.set_zooms([VOXEL] * 3)
    folder = tmp_path / "AD"
    folder.mkdir()
    volume.to_filename(folder / "a.hdr")
    (folder / "a.mat").unlink(missing_ok=True)
    content = bytearray((folder / "a.hdr").read_bytes())
    content[252] = orient
    (folder / "a.hdr").write_bytes(content)
    with pytest.raises(ValueError, match="left and right are unknown.*Analyze.*--unoriented"):
        read_volume(folder / "a.img", False)
    if orient == 3:
        with pytest.raises(ValueError, match="its orient is 3"):
            read_volume(folder / "a.img", True)
        return
    np.testing.assert_allclose(mark(*read_volume(folder / "a.img", True)), EXPECTED, atol=3)


def test_the_position_of_an_analyze_volume_may_lie_in_a_mat_file(tmp_path: Path):
    values, affine = head()
    volume = nibabel.Spm2AnalyzeImage(values, affine)
    volume.header["orient"] = b"\2"  # the .mat file knows better
    volume.to_filename(tmp_path / "a.img")
    assert (tmp_path / "a.mat").exists()
    np.testing.assert_allclose(mark(*read_volume(tmp_path / "a.img", True)), EXPECTED, atol=3)


def minc(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    """A MINC-1 file of values [X, Y, Z], whose axes are written as z, y, x."""
    from scipy.io import netcdf_file

    with netcdf_file(path, "w") as file:
        for axis, name in ((2, "zspace"), (1, "yspace"), (0, "xspace")):
            file.createDimension(name, values.shape[axis])
            variable = file.createVariable(name, "i", ())
            variable.step, variable.start = VOXEL, affine[axis, 3]
            variable.spacing, variable.direction_cosines = "regular__", np.eye(3)[axis]
        image = file.createVariable("image", np.dtype("i2"), ("zspace", "yspace", "xspace"))
        image.signtype, image.valid_range = "signed__", np.array([0, 30000.0])
        for name, value in (("image-min", 0.0), ("image-max", 300.0)):
            limit = file.createVariable(name, "d", ())
            limit.data[...] = value
        image[:] = (values.T * 100).round().astype("i2")


def test_minc_is_read_or_says_what_it_needs(tmp_path: Path):
    values, affine = head()
    minc(tmp_path / "a.mnc", values, affine)
    np.testing.assert_allclose(mark(*read_volume(tmp_path / "a.mnc", False)), EXPECTED, atol=3)
    (tmp_path / "b.mnc").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(1000))
    try:
        import h5py  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ValueError, match="needs h5py: pip install h5py"):
            read_volume(tmp_path / "b.mnc", False)


def afni(path: Path, values: np.ndarray) -> None:
    """An AFNI pair of values [X, Y, Z] whose axes run as LPI, as AFNI's own RAI would say."""
    shape = values.shape
    attributes = [
        ("string", "TYPESTRING", "'3DIM_HEAD_ANAT~"), ("string", "BYTEORDER_STRING", "'LSB_FIRST~"),
        ("string", "TEMPLATE_SPACE", "'ORIG~"),
        ("integer", "DATASET_RANK", [3, 1]), ("integer", "DATASET_DIMENSIONS", [*shape, 0, 0]),
        ("integer", "BRICK_TYPES", [3]), ("float", "BRICK_FLOAT_FACS", [0]),
        ("integer", "ORIENT_SPECIFIC", [1, 2, 4]), ("integer", "SCENE_DATA", [0, 0, 0]),
        ("float", "ORIGIN", [0, 0, 0]), ("float", "DELTA", [VOXEL, -VOXEL, VOXEL]),
        ("float", "IJK_TO_DICOM_REAL", [-VOXEL, 0, 0, 0, 0, -VOXEL, 0, 0, 0, 0, VOXEL, 0]),
    ]  # fmt: skip
    text = ""
    for kind, name, value in attributes:
        count = len(value) - (kind == "string")
        shown = value if kind == "string" else " " + " ".join(map(str, value))
        text += f"\ntype = {kind}-attribute\nname = {name}\ncount = {count}\n{shown}\n"
    path.with_suffix(".HEAD").write_text(text)
    path.with_suffix(".BRIK").write_bytes(values.astype("<f4").tobytes(order="F"))


def test_afni_is_read(tmp_path: Path):
    values, _ = head()
    afni(tmp_path / "a+orig.HEAD", values)
    read, affine = read_volume(tmp_path / "a+orig.BRIK", False)
    np.testing.assert_allclose(read, values)
    np.testing.assert_allclose(mark(read, affine), EXPECTED, atol=3)


def test_par_and_rec_are_read(tmp_path: Path):
    source = Path(nibabel.__file__).parent / "tests" / "data" / "T1.PAR"
    if not source.exists():
        pytest.skip("nibabel came without its own test data")
    shutil.copy(source, tmp_path / "a.PAR")
    with open(source) as file:
        shape = nibabel.parrec.PARRECHeader.from_fileobj(file).get_data_shape()
    values = np.random.default_rng(0).integers(0, 900, shape).astype("<u2")
    content = values.tobytes(order="F")
    (tmp_path / "a.REC").write_bytes(content)
    assert find(tmp_path)[0] == {"a.REC"}
    assert read_volume(tmp_path / "a.REC", False)[0].shape == shape[:3]
    (tmp_path / "a.REC").write_bytes(content[:-9])
    with pytest.raises(ValueError, match="truncated"):
        read_volume(tmp_path / "a.REC", False)


def test_raw_scans_of_oasis_are_imported_with_consent(tmp_path: Path, capsys):
    values, affine = head()
    write(tmp_path / "x.nii", values, affine, "ASL")
    turned = nibabel.load(tmp_path / "x.nii").get_fdata(dtype="f4")
    volume = nibabel.AnalyzeImage(turned, None)
    volume.header.set_zooms([VOXEL] * 3)
    volume.header["orient"] = b"\2"
    root, rows = tmp_path / "oasis", "ID,CDR\n"
    for i in range(4):
        name = f"OAS1_000{i}_MR1"
        (root / name / "RAW").mkdir(parents=True)
        volume.to_filename(root / name / "RAW" / f"{name}_mpr-1_anon.img")
        touch(root / name / "FSL_SEG", f"{name}_mpr-1_anon_111_t88_masked_gfc_fseg.img")
        rows += f"{name},{i % 2}\n"
    (root / "oasis.csv").write_text(rows)
    options = ImportOptions(root, tmp_path / "out", root / "oasis.csv", slices=2, size=200)
    with pytest.raises(UserError, match="left out: 4 x left and right are unknown.*; 4 x output"):
        import_scans(options)
    import_scans(replace(options, unoriented=True))
    assert {row["participant"] for row in manifest(options.out)} == {
        f"OAS1_000{i}" for i in range(4)
    }
    with Image.open(next(options.out.rglob("*_1.png"))) as image:
        bright = np.argwhere(np.asarray(image) > 230).mean(0) - 99.5
    np.testing.assert_allclose(bright, [-50, -40], atol=3)  # front is up, left is left


def test_half_of_a_pair_says_what_is_missing(tmp_path: Path):
    values, affine = head()
    nibabel.Nifti1Pair(values, affine).to_filename(tmp_path / "a.img")
    shutil.copy(tmp_path / "a.img", tmp_path / "b.img")
    shutil.copy(tmp_path / "a.hdr", tmp_path / "c.hdr")
    assert find(tmp_path)[0] == {"a.img", "b.img", "c.hdr"}
    assert open_volume(tmp_path / "a.img", False)[0].shape == values.shape
    for name, words in (
        ("b.img", "its header file is missing"),
        ("c.hdr", "there is no c.img beside it"),
    ):
        with pytest.raises(ValueError, match=words):
            open_volume(tmp_path / name, False)


# Headers and damage


def test_a_valid_qform_replaces_an_empty_sform(tmp_path: Path):
    values, affine = head()
    volume, path = nibabel.Nifti1Image(values, affine), tmp_path / "a.nii"
    volume.set_qform(affine, 1)
    nibabel.save(volume, path)
    content = bytearray(path.read_bytes())
    content[280:328] = bytes(48)  # srow_x, srow_y, srow_z; their code stays
    path.write_bytes(content)
    read, found = read_volume(path, False)
    np.testing.assert_allclose(found, affine, atol=1e-3)
    content[252:254] = bytes(2)  # now qform has no code
    path.write_bytes(content)
    with pytest.raises(ValueError, match="voxels of 0 x 0 x 0 mm"):
        read_volume(path, False)


@pytest.mark.parametrize("kind", ["nii.gz", "mgz", "img.gz"])
def test_a_changed_bit_is_noticed(tmp_path: Path, kind):
    values, affine = head()
    values = (values + np.random.default_rng(0).normal(0, 2, values.shape)).astype(np.float32)
    made = {"mgz": nibabel.MGHImage, "img.gz": nibabel.Nifti1Pair}.get(kind, nibabel.Nifti1Image)
    small = made(values[::2, ::2, ::2], affine @ np.diag([2, 2, 2, 1.0]))
    path = tmp_path / f"a.{kind}"
    small.to_filename(path)
    read_volume(path, False)
    content = path.read_bytes()
    rng = np.random.default_rng(1)
    for place in rng.integers(len(content) // 10, len(content) - 4, 12):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged: its gzip checksum or data are wrong"):
            read_volume(path, False)
    # members and padding are no damage
    path.write_bytes(content + bytes(512))
    read_volume(path, False)
    raw = gzip.decompress(content)
    path.write_bytes(gzip.compress(raw[:9999], 1) + gzip.compress(raw[9999:], 1))
    np.testing.assert_array_equal(read_volume(path, False)[0], small.get_fdata(dtype="f4"))


def test_more_data_than_the_header_says_are_not_read(tmp_path: Path):
    values, affine = head()
    path = write(tmp_path / "a.nii.gz", values, affine)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(2**25), 1))
    with pytest.raises(ValueError, match="holds more data than its header says"):
        read_volume(path, False)


# DICOM


def test_dicom_files_are_known_by_ending_and_content(tmp_path: Path):
    whole = bytes(128) + b"DICM" + bytes(9)
    bare = bytes.fromhex("08000500") + b"CS\x0a\0ISO_IR 100" + bytes(200)
    implicit = bytes.fromhex("080016001a000000") + b"1.2.840" + bytes(200)
    for name in ("a.dicom", "a.MR", "7", "1.2.840.113", "IM0001", "MR.1.2.3"):
        for content in (whole, bare, implicit):
            (tmp_path / name).write_bytes(content)
            assert is_dicom(tmp_path / name), (name, content[:8])
        for content in (b"text" * 50, bytes(200), b"", whole[:131]):
            (tmp_path / name).write_bytes(content)
            assert not is_dicom(tmp_path / name), (name, content[:8])
    for name in ("DICOMDIR", "notes.txt", "table.csv", "a.nii"):
        (tmp_path / name).write_bytes(whole)
        assert not is_dicom(tmp_path / name)
    assert find(tmp_path)[0] == {"a.nii"}
    (tmp_path / "AD" / "I1").mkdir(parents=True)
    (tmp_path / "AD" / "I1" / "DICOMDIR").write_bytes(whole)
    assert "AD/I1" not in find(tmp_path)[0]
    (tmp_path / "AD" / "I1" / "1.2.3").write_bytes(bare)
    assert "AD/I1" in find(tmp_path)[0]


def series(
    folder: Path, number: int = 1, text: str = "MPRAGE", slices: range | list[int] = range(20, 42),
    moved: int = -1, name: str = "{number}_{k}.dcm",
) -> Path:  # fmt: skip
    """A series of axial slices of a head; one slice may lie a millimetre too high."""
    pydicom = pytest.importorskip("pydicom")
    values, affine = head()
    noisy = values + np.random.default_rng(number).integers(0, 40, values.shape)
    folder.mkdir(parents=True, exist_ok=True)
    for k in slices:
        path = folder / name.format(number=number, k=k)
        write_dicom(pydicom, path, noisy, affine, k)
        data = pydicom.dcmread(path)
        data.SeriesNumber, data.SeriesDescription = number, text
        data.SeriesInstanceUID = f"1.2.5.{number}"
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}.{k + 1}"
        if k == moved:
            x, y, z = data.ImagePositionPatient
            data.ImagePositionPatient = [x, y, z + 1]
        data.save_as(path, enforce_file_format=True)
    return folder


@needs_converter
def test_of_several_series_the_scan_is_read(tmp_path: Path):
    folder = series(tmp_path / "a", 3, "T1 MPRAGE sag")
    expected = read_volume(folder, False, "T1w")[0]
    series(folder, 1, "survey", range(30, 33))
    series(folder, 2, "AAHead_Scout", range(20, 35))
    series(folder, 4, "Axial T2 FLAIR")
    warnings: list[str] = []
    np.testing.assert_array_equal(read_volume(folder, False, "T1w", warnings)[0], expected)
    assert any("Patient Position" in text for text in warnings)
    series(folder, 5, "unnamed")  # says nothing; another one says that it is wanted
    np.testing.assert_array_equal(read_volume(folder, False, "T1w")[0], expected)
    with pytest.raises(ValueError, match="3 series could be the scan: 3_T1_MPRAGE_sag, 4_Ax.*, 5_"):
        read_volume(folder, False, "any")
    series(folder, 6, "MPRAGE repeat")
    with pytest.raises(ValueError, match="2 series could .*: 3_T1_MPRAGE_sag, 6_MPRAGE_repeat"):
        read_volume(folder, False, "T1w")


@needs_converter
def test_a_single_series_of_another_contrast_is_no_scan(tmp_path: Path):
    folder = series(tmp_path / "a", 4, "Axial T2 FLAIR")
    with pytest.raises(ValueError, match=r"^contrast FLAIR \(--contrast\)$"):
        read_volume(folder, False, "T1w")
    assert read_volume(folder, False, "FLAIR")[0].shape == (68, 78, 22)
    series(folder, 5, "localizer")
    with pytest.raises(ValueError, match=r"no series .*: 4_Axial.* \(contrast.*5_.* \(localizer"):
        read_volume(folder, False, "T1w")


@needs_converter
@pytest.mark.parametrize(
    "change",
    [
        {"slices": [k for k in range(20, 44) if k != 30]}, {"moved": 30},
        {"slices": [k for k in range(20, 44) if k not in (31, 32, 33)]},
    ],
)  # fmt: skip
def test_a_gap_between_slices_leaves_the_scan_out(tmp_path: Path, change):
    folder = series(tmp_path / "a", **change)
    with pytest.raises(ValueError, match="dcm2niix: .*(Missing images|Interslice distance varies)"):
        read_volume(folder, False, "T1w")
    series(tmp_path / "b", 2, "FLAIR", **change)  # of a series that is not meant it says nothing
    assert read_volume(series(tmp_path / "b"), False, "T1w")[0].shape == (68, 78, 22)


@needs_converter
@pytest.mark.parametrize("name", ["{k}", "1.2.840.{k}", "{k}.MR", "IM{k}.dicom"])
@pytest.mark.parametrize("skip", [0, 132])
def test_dicom_files_of_any_name_are_converted(tmp_path: Path, name, skip):
    folder = series(tmp_path / "AD" / "a", name=name)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[skip:])  # without its preamble
    assert find(tmp_path)[0] == {"AD/a"}
    assert read_volume(folder, False, "T1w")[0].shape == (68, 78, 22)


@needs_converter
def test_warnings_of_the_converter_name_the_scan(tmp_path: Path, capsys):
    root, (values, affine) = tmp_path / "scans", head()
    for name in ("AD/d1", "NC/d2"):
        series(root / name / "mprage", slices=range(70))
    for name in ("AD/n1", "NC/n2"):
        write(root / name / "t1.nii", values, affine)
    series(root / "AD" / "n1" / "mprage", slices=[k for k in range(70) if k != 30])
    import_scans(ImportOptions(root, tmp_path / "out", slices=2, size=64))
    out = capsys.readouterr().out
    assert "  2 x Patient Position (0018,5100) not specified (issue 642).: AD/d1/mprage, NC" in out
    assert list(left_out(tmp_path / "out")) == ["AD/n1/mprage"]


def test_the_converter_is_found_beside_python(tmp_path: Path, monkeypatch):
    program = tmp_path / "env" / "bin" / "dcm2niix"
    touch(tmp_path, "env/bin/dcm2niix", "env/bin/python")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    assert find_converter() == str(program)
    program.unlink()
    with pytest.raises(ValueError, match="DICOM needs dcm2niix: pip install dcm2niix"):
        find_converter()


def test_phase_images_of_a_series_are_dropped(tmp_path: Path):
    values, affine = head()
    names = ("5_MPRAGE", "5_MPRAGE_ph", "6_gre_real")
    files = {name: write(tmp_path / f"{name}.nii", values, affine) for name in names}
    assert choose_series(files, "any") == "5_MPRAGE"


# Report


def test_reasons_are_counted_with_a_few_names():
    pairs = [(f"s{i}", "dead link") for i in range(9)]
    pairs += [(f"t{i}", f"truncated: {i} bytes of 900") for i in range(4)]
    pairs += [(f"c{i}", f"contrast T{i + 1}w (--contrast)") for i in range(2)]
    pairs += [("u", "voxels of 0.5 x 9 mm"), ("v", "voxels of 0.1 x 40 mm"), ("w", "empty file")]
    assert [(why, len(names)) for why, names in by_reason(pairs[::-1])] == [
        ("dead link", 9), ("truncated: 0 bytes of 900 or similar", 4),
        ("voxels of 0.5 x 9 mm or similar", 2), ("contrast T1w (--contrast)", 1),
        ("contrast T2w (--contrast)", 1), ("empty file", 1),
    ]  # fmt: skip


@pytest.fixture
def four(tmp_path: Path) -> ImportOptions:
    """Four good scans of two classes."""
    values, affine = head()
    for name in ("AD/a", "AD/b", "NC/c", "NC/d"):
        write(tmp_path / "scans" / name / "x.nii", values, affine)
    return ImportOptions(tmp_path / "scans", tmp_path / "out", slices=2, size=64)


def test_a_thousand_bad_volumes_give_a_few_lines_and_a_list(four: ImportOptions, capsys):
    touch(four.scans / "AD" / "a", *(f"{i:04}.nii" for i in range(1000)))
    touch(four.scans / "NC" / "c", *(f"{i}_FLAIR.nii" for i in range(3)))
    import_scans(four)
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 20
    assert f"1003 left out, see {four.out / 'left_out.csv'}:\n" in out
    assert "  1000 x empty file: AD/a/0000.nii, AD/a/0001.nii" in out and "0005.nii" not in out
    assert "AD/a/0001.nii, ...\n  3 x contrast FLAIR (--contrast): NC/c/0_FLAIR.nii, NC" in out
    listed = left_out(four.out)
    assert len(listed) == 1003 and listed["AD/a/0999.nii"] == "empty file"
    touch(four.scans / "NC" / "e,\n2", "mask.nii")
    for path in [*four.scans.rglob("0???.nii"), *four.scans.rglob("*_FLAIR.nii")]:
        path.unlink()
    import_scans(four)  # the list is made anew
    assert left_out(four.out) == {"NC/e,\n2/mask.nii": "mask or segmentation"}
    assert "  1 x mask or segmentation: NC/e, 2/mask.nii\n" in capsys.readouterr().out


def test_if_nothing_can_be_imported_nothing_is_written(four: ImportOptions):
    with pytest.raises(UserError, match="no NIfTI .* DICOM folder called z$"):
        import_scans(replace(four, pattern="z"))
    for path in four.scans.rglob("*.nii"):
        path.write_bytes(b"")
    touch(four.scans / "AD" / "a", "y_FLAIR.nii")
    with pytest.raises(UserError, match="left out: 4 x empty file; 1 x contrast FLAIR"):
        import_scans(four)
    assert not four.out.exists()
    values, affine = head()
    for path in four.scans.rglob("x.nii"):
        write(path, values * 0, affine)  # good headers, bad values
    with pytest.raises(UserError, match="left out: 4 x all voxels have one value; 1 x contrast"):
        import_scans(four)
    assert not four.out.exists()


def test_the_list_is_not_part_of_the_training_set(four: ImportOptions):
    touch(four.scans / "AD" / "a", "mask.nii")
    import_scans(four)
    assert find_slices(four.out)[0] == ["AD", "NC"]
    assert (four.out / "left_out.csv").read_text().splitlines()[0] == "path,reason"
