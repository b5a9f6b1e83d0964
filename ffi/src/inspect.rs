//! Statistics, checks, description
//!
//! All calls from any thread, and while the image is in use. qcr_get_info(), qcr_get_stats() and
//! qcr_stats_prometheus() do no I/O and may be called from every callback.

use std::ffi::{CString, c_char, c_int, c_void};

use qcow_recycler::blocking::block_on;
use qcow_recycler::{CheckReport, Options, Repair, Stats};

use crate::abi::{self, Out, Shared};
use crate::boundary::{call, on_image};
use crate::callbacks::{Callbacks, qcr_block_callbacks};
use crate::device::Device;
use crate::error::{Fault, qcr_error};
use crate::image::qcr_image;
use crate::options::path_of;

/// What an image and its recycler are doing. All sizes are in bytes. Those up to recycler_running describe this
/// moment, those from guest_reads on have only grown since the image was opened.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_stats {
    /// sizeof(struct qcr_stats), set by the caller.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Size of the virtual disk.
    pub virtual_size: u64,
    /// Length of the image file.
    pub file_size: u64,
    /// Clusters that something refers to, metadata included.
    pub used: u64,
    /// Clusters whose unlinking is not durable yet, or that an older request may still use.
    pub freed: u64,
    /// Free clusters with arbitrary contents.
    pub junk: u64,
    /// Free clusters overwritten with zeroes, not flushed yet.
    pub erased: u64,
    /// Free clusters that are zero after any crash: the pool for new guest writes.
    pub available: u64,
    /// Clusters allocated and not linked yet, or being erased.
    pub roots: u64,
    /// Destinations of moves in progress.
    pub copies: u64,
    /// Clusters being copied.
    pub moves_copying: u64,
    /// Clusters copied, not flushed.
    pub moves_copied: u64,
    /// Clusters whose copy is durable.
    pub moves_flushed: u64,
    /// Clusters whose new reference is not durable yet.
    pub moves_referenced: u64,
    /// 1 while the recycler runs, 0 while it is stopped or paused.
    pub recycler_running: u64,
    /// Guest read requests.
    pub guest_reads: u64,
    /// Bytes the guest read.
    pub guest_read_bytes: u64,
    /// Guest write requests.
    pub guest_writes: u64,
    /// Bytes the guest wrote.
    pub guest_write_bytes: u64,
    /// Guest discard and write-zeroes requests.
    pub guest_discards: u64,
    /// Bytes the guest discarded or zeroed.
    pub guest_discard_bytes: u64,
    /// Guest flush requests.
    pub guest_flushes: u64,
    /// Flushes of the device.
    pub device_flushes: u64,
    /// Bytes of metadata read from the device.
    pub metadata_read_bytes: u64,
    /// Bytes of metadata written to the device.
    pub metadata_write_bytes: u64,
    /// Bytes of clusters whose move was completed.
    pub moved_bytes: u64,
    /// Moves cancelled by guest writes and discards.
    pub moves_cancelled: u64,
    /// Bytes erased.
    pub erased_bytes: u64,
    /// Bytes cut off the end of the file.
    pub truncated_bytes: u64,
    /// Compactions completed.
    pub compactions: u64,
    /// Failures in the recycler's work.
    pub background_errors: u64,
}

// SAFETY: integers only, no padding.
unsafe impl Shared for qcr_stats {
    const NAME: &'static str = "stats";
}

fn to_c(stats: &Stats) -> qcr_stats {
    qcr_stats {
        struct_size: 0,
        reserved: 0,
        virtual_size: stats.virtual_size,
        file_size: stats.file_size,
        used: stats.used,
        freed: stats.freed,
        junk: stats.junk,
        erased: stats.erased,
        available: stats.available,
        roots: stats.roots,
        copies: stats.copies,
        moves_copying: stats.moves_copying,
        moves_copied: stats.moves_copied,
        moves_flushed: stats.moves_flushed,
        moves_referenced: stats.moves_referenced,
        recycler_running: stats.recycler_running,
        guest_reads: stats.guest_reads,
        guest_read_bytes: stats.guest_read_bytes,
        guest_writes: stats.guest_writes,
        guest_write_bytes: stats.guest_write_bytes,
        guest_discards: stats.guest_discards,
        guest_discard_bytes: stats.guest_discard_bytes,
        guest_flushes: stats.guest_flushes,
        device_flushes: stats.device_flushes,
        metadata_read_bytes: stats.metadata_read_bytes,
        metadata_write_bytes: stats.metadata_write_bytes,
        moved_bytes: stats.moved_bytes,
        moves_cancelled: stats.moves_cancelled,
        erased_bytes: stats.erased_bytes,
        truncated_bytes: stats.truncated_bytes,
        compactions: stats.compactions,
        background_errors: stats.background_errors,
    }
}

/// Fills `stats`.
///
/// Errors: -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_get_stats(image: *mut qcr_image, stats: *mut qcr_stats, error: *mut qcr_error) -> c_int {
    let body = |image: &qcr_image| {
        // SAFETY: the header's rule for structs.
        let out = unsafe { Out::new(stats)? };
        out.store(to_c(&image.disk().stats()));
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Writes the statistics as Prometheus text, labelled with the image's id, into `buffer` of `size` bytes, as
/// snprintf() does: always closed by a zero byte if `size` is not 0, and cut if it does not fit. `*needed` becomes
/// the text's length without that byte: the text was cut if `*needed >= size`. `buffer` may be NULL if `size` is 0.
///
/// Errors: -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_stats_prometheus(
    image: *mut qcr_image,
    buffer: *mut c_char,
    size: usize,
    needed: *mut usize,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        if needed.is_null() {
            return Err(Fault::null("needed"));
        }
        if buffer.is_null() && size > 0 {
            return Err(Fault::null("buffer"));
        }
        let text = image.disk().stats().prometheus(image.id());
        let fits = text.len().min(size.saturating_sub(1));
        // SAFETY: `fits + 1 <= size` bytes are writable there, or `size` is 0 and nothing is written there; `needed` is
        // not NULL.
        unsafe {
            if size > 0 {
                std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buffer, fits);
                buffer.add(fits).write(0);
            }
            needed.write(text.len());
        }
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Image flag: made with lazy refcounts.
pub const QCR_INFO_LAZY_REFCOUNTS: u32 = 0x1;
/// Image flag: the handle refuses changes.
pub const QCR_INFO_READ_ONLY: u32 = 0x2;
/// Image flag: L2 entries are extended, so that clusters are allocated in 32 parts.
pub const QCR_INFO_EXTENDED_L2: u32 = 0x4;

/// Image flag: the guest's data is in an external data file.
pub const QCR_INFO_DATA_FILE: u32 = 0x8;
/// Image flag: the external data file reads as the disk does, without the image.
pub const QCR_INFO_RAW_DATA_FILE: u32 = 0x10;
/// Image flag: guest data is encrypted.
pub const QCR_INFO_ENCRYPTED: u32 = 0x20;

/// What an image is. Sizes are in bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_info {
    /// sizeof(struct qcr_info), set by the caller.
    pub struct_size: u32,
    /// Of the format: 2 or 3.
    pub version: u32,
    /// Size of the virtual disk.
    pub virtual_size: u64,
    /// Cluster size.
    pub cluster_size: u64,
    /// Length of the image file.
    pub file_size: u64,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// QCR_INFO_LAZY_REFCOUNTS, QCR_INFO_READ_ONLY, QCR_INFO_EXTENDED_L2, QCR_INFO_DATA_FILE, QCR_INFO_RAW_DATA_FILE,
    /// QCR_INFO_ENCRYPTED.
    pub flags: u32,
    /// How many internal snapshots there are.
    pub snapshots: u32,
    /// How many things keep parts of the image where they are: see qcr_get_pinned().
    pub pinned: u32,
    /// The backing file's name as the image records it, or "".
    pub backing_file: [c_char; 1024],
    /// The backing file's format as the image records it, or "".
    pub backing_format: [c_char; 64],
    /// The external data file's name as the image records it, or "".
    pub data_file: [c_char; 1024],
}

// SAFETY: integers only, no padding.
unsafe impl Shared for qcr_info {
    const NAME: &'static str = "info";
}

/// Fills `info`.
///
/// Errors: -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_get_info(image: *mut qcr_image, info: *mut qcr_info, error: *mut qcr_error) -> c_int {
    let body = |image: &qcr_image| {
        // SAFETY: the header's rule for structs.
        let out = unsafe { Out::new(info)? };
        let found = image.disk().info();
        let lazy = if found.lazy_refcounts { QCR_INFO_LAZY_REFCOUNTS } else { 0 };
        let read_only = if found.read_only { QCR_INFO_READ_ONLY } else { 0 };
        let extended = if found.extended_l2 { QCR_INFO_EXTENDED_L2 } else { 0 };
        let data_file = if found.data_file.is_some() { QCR_INFO_DATA_FILE } else { 0 };
        let raw = if found.data_file_raw { QCR_INFO_RAW_DATA_FILE } else { 0 };
        let encrypted = if found.encryption.is_some() { QCR_INFO_ENCRYPTED } else { 0 };
        let mut c = qcr_info {
            version: found.version,
            virtual_size: found.virtual_size,
            cluster_size: found.cluster_size,
            file_size: found.file_size,
            refcount_bits: found.refcount_bits,
            flags: lazy | read_only | extended | data_file | raw | encrypted,
            snapshots: found.snapshots,
            pinned: u32::try_from(found.pinned.len()).unwrap_or(u32::MAX),
            ..qcr_info::zeroed()
        };
        abi::store_text(&mut c.backing_file, found.backing_file.as_deref().unwrap_or_default());
        abi::store_text(&mut c.backing_format, found.backing_format.as_deref().unwrap_or_default());
        abi::store_text(&mut c.data_file, found.data_file.as_deref().unwrap_or_default());
        out.store(c);
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Takes one line of UTF-8, valid during the call; called on the thread of the call it was given to, with no lock
/// of the library held. It must return by itself (no longjmp, no C++ exception).
pub type qcr_text_fn = Option<unsafe extern "C" fn(user: *mut c_void, text: *const c_char)>;

/// Calls `each` with `user` for everything that keeps parts of the image where they are, in words.
///
/// Errors: -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_get_pinned(
    image: *mut qcr_image,
    each: qcr_text_fn,
    user: *mut c_void,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        if each.is_none() {
            return Err(Fault::null("each"));
        }
        // SAFETY: the header's rules for callbacks.
        unsafe { tell(&image.disk().info().pinned, each, user) };
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Repair: nothing, only look.
pub const QCR_REPAIR_NONE: u32 = 0;
/// Repair: leaked clusters.
pub const QCR_REPAIR_LEAKS: u32 = 1;
/// Repair: everything that can be repaired without a risk to guest data.
pub const QCR_REPAIR_ALL: u32 = 2;

/// What a check found.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_check_report {
    /// sizeof(struct qcr_check_report), set by the caller.
    pub struct_size: u32,
    /// How many findings were put in words; the rest, if there are very many, are only counted.
    pub messages: u32,
    /// Errors that may lose data: refcounts too low, references outside the file, overlaps, bad entries.
    pub corruptions: u64,
    /// Clusters counted more often than they are referred to.
    pub leaks: u64,
    /// Of `corruptions`, how many were repaired.
    pub corruptions_fixed: u64,
    /// Of `leaks`, how many were repaired.
    pub leaks_fixed: u64,
    /// Guest clusters that are allocated in the file.
    pub allocated_clusters: u64,
    /// Guest clusters of the virtual disk.
    pub total_clusters: u64,
    /// Allocated guest clusters that do not follow their neighbour in the file.
    pub fragmented_clusters: u64,
    /// End of the last cluster in use, in bytes.
    pub image_end_offset: u64,
}

// SAFETY: integers only, no padding.
unsafe impl Shared for qcr_check_report {
    const NAME: &'static str = "report";
}

/// Checks an open image, while it is in use; repairs nothing. Findings are not errors: they are in `report`, and in
/// words in the calls of `finding` (may be NULL).
///
/// Errors: -EBADF; the device's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_check(
    image: *mut qcr_image,
    finding: qcr_text_fn,
    user: *mut c_void,
    report: *mut qcr_check_report,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        // SAFETY: the header's rules for structs and callbacks.
        unsafe { report_check(Out::new(report)?, finding, user, || Ok(image.disk().check()?)) }
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Checks the image in the file `path`, which nobody may be using, and repairs what `repair` allows
/// (QCR_REPAIR_NONE, QCR_REPAIR_LEAKS or QCR_REPAIR_ALL). Findings are not errors: they are in `report`, and in
/// words in the calls of `finding` (may be NULL).
///
/// Errors: as qcr_open_path().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_check_path(
    path: *const c_char,
    repair: u32,
    finding: qcr_text_fn,
    user: *mut c_void,
    report: *mut qcr_check_report,
    error: *mut qcr_error,
) -> c_int {
    let body = || {
        // SAFETY: the header's rules for structs and strings.
        let (out, path) = unsafe { (Out::new(report)?, path_of(abi::string("path", path)?)) };
        let repair = repair_of(repair)?;
        let options = Options { read_only: repair == Repair::No, ..Options::default() };
        let device = Device::open(&path, &options)?;
        // SAFETY: the header's rules for callbacks.
        unsafe { report_check(out, finding, user, || offline(&device, repair)) }
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

/// As qcr_check_path(), on block callbacks; then their `destroy` is called.
///
/// Errors: as qcr_open_callbacks().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_check_callbacks(
    callbacks: *const qcr_block_callbacks,
    repair: u32,
    finding: qcr_text_fn,
    user: *mut c_void,
    report: *mut qcr_check_report,
    error: *mut qcr_error,
) -> c_int {
    // Before anything can fail: `destroy` must run even then.
    // SAFETY: the header's rules for structs and callbacks.
    let callbacks = unsafe { Callbacks::adopt(callbacks) };
    let body = || {
        let callbacks = callbacks?;
        let repair = repair_of(repair)?;
        let device = Device::on(callbacks, repair == Repair::No)?;
        // SAFETY: the header's rules for structs and callbacks.
        unsafe { report_check(Out::new(report)?, finding, user, || offline(&device, repair)) }
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

fn repair_of(repair: u32) -> Result<Repair, Fault> {
    match repair {
        QCR_REPAIR_NONE => Ok(Repair::No),
        QCR_REPAIR_LEAKS => Ok(Repair::Leaks),
        QCR_REPAIR_ALL => Ok(Repair::All),
        other => Err(Fault::argument("repair", format!("{other} is unknown"))),
    }
}

fn offline(device: &Device, repair: Repair) -> Result<CheckReport, Fault> {
    Ok(block_on(qcow_recycler::check::check(device, repair))?)
}

/// # Safety
/// `finding` and `user` keep the header's rules for callbacks.
unsafe fn report_check(
    out: Out<qcr_check_report>,
    finding: qcr_text_fn,
    user: *mut c_void,
    check: impl FnOnce() -> Result<CheckReport, Fault>,
) -> Result<(), Fault> {
    let found = check()?;
    // SAFETY: the header's rules for callbacks.
    unsafe { tell(&found.messages, finding, user) };
    out.store(qcr_check_report {
        struct_size: 0,
        messages: u32::try_from(found.messages.len()).unwrap_or(u32::MAX),
        corruptions: found.corruptions,
        leaks: found.leaks,
        corruptions_fixed: found.corruptions_fixed,
        leaks_fixed: found.leaks_fixed,
        allocated_clusters: found.allocated_clusters,
        total_clusters: found.total_clusters,
        fragmented_clusters: found.fragmented_clusters,
        image_end_offset: found.image_end_offset,
    });
    Ok(())
}

/// # Safety
/// `each` and `user` keep the header's rules for callbacks.
unsafe fn tell(lines: &[String], each: qcr_text_fn, user: *mut c_void) {
    let Some(each) = each else { return };
    for line in lines {
        let line = CString::new(line.replace('\0', "?")).unwrap_or_default();
        // SAFETY: the header's rules for callbacks, as promised by the caller.
        unsafe { each(user, line.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The struct's numbers are the core's, all of them and in its order.
    #[test]
    fn every_statistic_is_passed_on() {
        let mut stats = Stats::default();
        stats.virtual_size = 1;
        stats.guest_reads = 2;
        stats.background_errors = 3;
        let c = to_c(&stats);
        let count = size_of::<qcr_stats>() / 8 - 1;
        // SAFETY: after its first eight bytes the struct is nothing but `u64`s.
        let numbers = unsafe { std::slice::from_raw_parts((&raw const c).cast::<u64>().add(1), count) };
        let core: Vec<u64> = stats.fields().map(|(_, _, _, value)| value).collect();
        assert_eq!(numbers, core);
    }
}
