//! Internal snapshots
//!
//! What the disk was at some moment, inside the image. QEMU reads these snapshots, and this library QEMU's. A change is
//! durable when its call returns; a power cut leaves it done or not done. All calls from any thread, and while the image is
//! in use: reads go on, what changes the disk waits for a part of the call whose length depends on how large the image's
//! tables are, not on the data.

use std::ffi::{c_char, c_int, c_void};

use qcow_recycler::SnapshotInfo;

use crate::abi::{self, Out, Shared};
use crate::boundary::on_image;
use crate::error::{Fault, qcr_error};
use crate::image::qcr_image;

/// An internal snapshot.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_snapshot {
    /// sizeof(struct qcr_snapshot): set by the caller, or as the library knows it where the library calls.
    pub struct_size: u32,
    /// When it was made, beyond `seconds`, in nanoseconds.
    pub nanoseconds: u32,
    /// When it was made, in seconds since 1970 (UTC).
    pub seconds: u64,
    /// How long the guest had been running, in nanoseconds, as far as whoever made it said.
    pub vm_clock: u64,
    /// Bytes of VM state; 0: there is none.
    pub vm_state_size: u64,
    /// Size of the virtual disk in bytes when it was made.
    pub virtual_size: u64,
    /// Its ID, which no other snapshot of the image has, UTF-8.
    pub id: [c_char; 128],
    /// Its name, UTF-8.
    pub name: [c_char; 256],
}

// SAFETY: integers only, no padding.
unsafe impl Shared for qcr_snapshot {
    const NAME: &'static str = "snapshot";
}

fn to_c(found: &SnapshotInfo) -> qcr_snapshot {
    let mut c = qcr_snapshot {
        struct_size: size_of::<qcr_snapshot>() as u32,
        nanoseconds: found.created.subsec_nanos(),
        seconds: found.created.as_secs(),
        vm_clock: u64::try_from(found.vm_clock.as_nanos()).unwrap_or(u64::MAX),
        vm_state_size: found.vm_state_size,
        virtual_size: found.virtual_size,
        ..qcr_snapshot::zeroed()
    };
    abi::store_text(&mut c.id, &found.id);
    abi::store_text(&mut c.name, &found.name);
    c
}

/// Takes a snapshot's description, valid during the call; called on the thread that called qcr_get_snapshots(), with no lock
/// of the library held. It must return by itself (no longjmp, no C++ exception).
pub type qcr_snapshot_fn = Option<unsafe extern "C" fn(user: *mut c_void, snapshot: *const qcr_snapshot)>;

/// Calls `each` with `user` for every internal snapshot, in the image's order.
///
/// Errors: -EBADF.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_get_snapshots(
    image: *mut qcr_image,
    each: qcr_snapshot_fn,
    user: *mut c_void,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        let each = each.ok_or_else(|| Fault::null("each"))?;
        for found in image.disk().snapshots()? {
            let c = to_c(&found);
            // SAFETY: the header's rules for callbacks; `c` outlives the call.
            unsafe { each(user, &raw const c) };
        }
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Makes a snapshot of the disk: of everything written by requests that had ended before this call, flushed or not; what
/// a request under way writes is in it or not. `made` may be NULL.
///
/// Errors: -EINVAL for a name that is empty, longer than 255 bytes, or the name or ID of a snapshot that there is;
/// -EOPNOTSUPP if the image's refcounts are too narrow for one more reference (those of one bit always), or beyond 65,536
/// snapshots; -EUCLEAN if the image's refcounts are wrong; -EROFS; -EBADF; those of writing. Nothing has changed then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_create_snapshot(
    image: *mut qcr_image,
    name: *const c_char,
    made: *mut qcr_snapshot,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        // SAFETY: the header's rules for structs and strings.
        let (out, name) = unsafe { (Out::optional(made)?, abi::text("name", name)?) };
        let found = image.disk().create_snapshot(name)?;
        if let Some(out) = out {
            out.store(to_c(&found));
        }
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Deletes the snapshot with this ID or, if there is none, this name. What only it used is free then, VM state as well.
///
/// Errors: -EINVAL if there is no such snapshot, or several have the name; otherwise as qcr_create_snapshot().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_delete_snapshot(
    image: *mut qcr_image,
    id_or_name: *const c_char,
    error: *mut qcr_error,
) -> c_int {
    // SAFETY: the header's rule for strings.
    let body = |image: &qcr_image| Ok(image.disk().delete_snapshot(unsafe { abi::text("id_or_name", id_or_name)? })?);
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Lets the disk be what it was when a snapshot was made, its size included; the snapshot is told as in
/// qcr_delete_snapshot(), and stays. What the disk was until now is lost unless another snapshot has it. Bitmaps that mark
/// what is written mark the whole disk.
///
/// The guest must not be running: what it remembers of the disk is not so any more. Requests under way end first.
///
/// Errors: as qcr_delete_snapshot(); -EOPNOTSUPP also if the disk had another size and the image is of version 2.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_apply_snapshot(
    image: *mut qcr_image,
    id_or_name: *const c_char,
    error: *mut qcr_error,
) -> c_int {
    // SAFETY: the header's rule for strings.
    let body = |image: &qcr_image| Ok(image.disk().apply_snapshot(unsafe { abi::text("id_or_name", id_or_name)? })?);
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}
