"""Cut the axial slices that the demo brains need out of the ICBM 2009a template.

A developer's tool: it needs nilearn's data files, which the package itself does not. Run once:

    pip install --no-deps nilearn==0.14.1
    python assets/make_template.py [FOLDER_OF_THE_NII_GZ]

It writes `icbm152_slices.npz` beside itself: K axial slices of H x W voxels, front up. The template
is symmetric, so only x <= 0 is kept; its last column is the midline, which mirrors the rest.
    t1, gm, wm      [K, H, W] uint8: T1 intensity; grey and white matter probability in 1/255
    distance        [K, H, W] uint8: signed distance to the lateral ventricles, negative inside,
                    smoothed (1 mm), in mm: distance_offset + distance_step * value, clipped
    origin, spacing [3] float: MNI (z, y, x) in mm of voxel (0, 0, 0), and mm to the next one

Source: ICBM 2009a nonlinear symmetric (Fonov et al. 2011, doi 10.1016/j.neuroimage.2010.07.033).
Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological
Institute, McGill University; the whole notice must stay beside anything derived from it.
"""

import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

SHA256 = {"t1": "421a10e8", "gm": "97a5ca69", "wm": "382d9281"}
ORIGIN = 98, 134, 72  # voxel (x, y, z) of the MNI origin
LEVELS = range(-14, 36, 2)  # mm
MARGIN = 3  # voxels of background kept round the brain
OFFSET, STEP = -12.0, 0.25  # mm, of the quantised distance: -12 to 51.75


def read_template(folder: Path) -> dict[str, np.ndarray]:
    """Return the volumes [x, y, z] as uint8, having checked that they are the known files."""
    volumes = {}
    for name, digest in SHA256.items():
        path = folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
            raise ValueError(f"{path} is not the file of nilearn 0.14.1 (sha256 {digest}...)")
        volumes[name] = np.asarray(nibabel.load(path).dataobj)
    return volumes


def lateral_ventricles(volumes: dict[str, np.ndarray]) -> np.ndarray:
    """Return their mask: the largest piece of deep CSF in an MNI box, less the cistern below."""
    gm, wm = (volumes[k].astype(np.float32) / 255 for k in ("gm", "wm"))
    x, y, z = np.ogrid[tuple(slice(-o, n - o) for o, n in zip(ORIGIN, gm.shape, strict=True))]
    box = (abs(x) < 38) & (y > -52) & (y < 34) & (z > -4) & (z < 30)
    cistern = (y < -24) & ((abs(x) < 13) & (z < 16) | (abs(x) < 26) & (z < 2))
    head = ndimage.binary_fill_holes(volumes["t1"] > 0)
    deep = ndimage.distance_transform_edt(head) > 15
    pieces, _ = ndimage.label((1 - gm - wm > 0.5) & box & ~cistern & deep)
    print("largest pieces of deep CSF, ml:", np.sort(np.bincount(pieces.flat)[1:])[::-1][:4] / 1e3)
    return pieces == np.bincount(pieces.flat)[1:].argmax() + 1


def signed_distance(mask: np.ndarray) -> np.ndarray:
    """Return the distance in mm to the surface of mask, negative inside."""
    outside, inside = (ndimage.distance_transform_edt(m) for m in (~mask, mask))
    return np.where(mask, 0.5 - inside, outside - 0.5)


def main() -> None:
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
    else:  # find_spec does not import nilearn, which would need all of its dependencies
        folder = Path(find_spec("nilearn").origin).parent / "datasets" / "data"
    volumes = read_template(folder)
    ventricles = lateral_ventricles(volumes)
    distance = ndimage.gaussian_filter(signed_distance(ventricles), 1)  # no voxel steps
    print(f"ventricles: {ventricles.sum() / 1e3} ml, smoothed {(distance < 0).sum() / 1e3} ml")
    distance = (distance - OFFSET) / STEP
    volumes["distance"] = distance.round().clip(0, 255).astype(np.uint8)

    levels = [ORIGIN[2] + z for z in LEVELS]
    brain = np.argwhere(volumes["t1"][:, :, levels].any(2))
    (x0, y0), (_, y1) = brain.min(0) - MARGIN, brain.max(0) + 1 + MARGIN
    assert all((v == v[::-1]).all() for v in volumes.values()), "the halves differ"
    x1 = ORIGIN[0] + 1
    slices = {k: v[x0:x1, y0:y1, levels].transpose(2, 1, 0)[:, ::-1] for k, v in volumes.items()}
    origin = np.array([LEVELS[0], y1 - 1 - ORIGIN[1], x0 - ORIGIN[0]], float)
    path = Path(__file__).with_name("icbm152_slices.npz")
    np.savez_compressed(
        path,
        **slices,
        origin=origin,
        spacing=np.array([LEVELS.step, -1.0, 1.0]),
        distance_offset=OFFSET,
        distance_step=STEP,
    )
    print(f"{path}: {slices['t1'].shape}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
