//! What an image is, and what it is doing.

use super::Image;
use super::encryption::Method;
use crate::clusters::epochs::Counter;
use crate::device::BlockDevice;
use crate::format::header::COMPATIBLE_LAZY_REFCOUNTS;
use crate::stats::Stats;
use crate::sync::atomic::Ordering::Relaxed;

/// What an image is. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// qcow2 version, 2 or 3.
    pub version: u32,
    /// Size of the virtual disk.
    pub virtual_size: u64,
    /// Cluster size.
    pub cluster_size: u64,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// Length of the image file.
    pub file_size: u64,
    /// Whether the image was made with lazy refcounts.
    pub lazy_refcounts: bool,
    /// Whether L2 entries are extended, so that clusters are allocated in 32 parts.
    pub extended_l2: bool,
    /// How guest data is encrypted, by QEMU's name: `luks` or `aes`.
    pub encryption: Option<&'static str>,
    /// Internal snapshots.
    pub snapshots: u32,
    /// The name of the backing file as the image records it.
    pub backing_file: Option<String>,
    /// The backing file's format as the image records it.
    pub backing_format: Option<String>,
    /// The name of the external data file as the image records it; empty if there is one that it does not name.
    pub data_file: Option<String>,
    /// Whether the external data file reads as the disk does, without the image.
    pub data_file_raw: bool,
    /// Whether the handle refuses changes.
    pub read_only: bool,
    /// What keeps parts of the image where they are when it is compacted: one reason each.
    pub pinned: Vec<String>,
}

impl<D: BlockDevice> Image<D> {
    /// What the image is.
    pub fn info(&self) -> Info {
        let mut pinned = Vec::new();
        if !self.header.unknown_extensions.is_empty() {
            pinned.push("unknown header extensions: clusters without a known owner stay where they are".to_owned());
        }
        if self.meta.external {
            pinned.push("an external data file: guest data stays where it is in that file".to_owned());
        }
        if self.encryption.method() == Some(Method::Luks) {
            pinned.push("encryption: the LUKS header stays where it is, lest the only copy of the key move".to_owned());
        }
        if !self.encryption.lets_data_move() && !self.meta.external {
            pinned.push(
                "encryption: data stays where it is, since its encryption depends on its place and no passphrase was given"
                    .to_owned(),
            );
        }
        Info {
            version: self.header.version,
            virtual_size: self.virtual_size(),
            cluster_size: self.meta.geometry.cluster_size(),
            refcount_bits: 1 << self.meta.geometry.refcount_order,
            file_size: self.file_size(),
            lazy_refcounts: self.header.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0,
            encryption: self.encryption.method().map(Method::name),
            extended_l2: self.meta.geometry.extended_l2,
            snapshots: self.snapshot_count(),
            backing_file: self.header.backing_file.clone(),
            backing_format: self.header.backing_format.clone(),
            data_file: self.meta.external.then(|| self.header.data_file.clone().unwrap_or_default()),
            data_file_raw: self.header.has_raw_data_file(),
            read_only: self.options.read_only,
            pinned,
        }
    }

    /// What the image and its recycler are doing. `recycler_running` is left 0: only who runs it knows.
    pub fn stats(&self) -> Stats {
        let bits = self.meta.geometry.cluster_bits;
        let file_size = self.file_size();
        let states = self.clusters.lock();
        let [copying, copied, flushed, referenced] = self.moves.gauges.each_ref().map(|g| g.load(Relaxed) << bits);
        let total = |counter| self.epochs.total(counter);
        Stats {
            virtual_size: self.virtual_size(),
            file_size,
            used: states.end.saturating_sub(states.unused_len()) << bits,
            freed: states.freed_len() << bits,
            junk: states.junk.len() << bits,
            erased: states.erased.len() << bits,
            available: states.available.len() << bits,
            roots: states.roots.len() << bits,
            copies: states.copies.len() << bits,
            moves_copying: copying,
            moves_copied: copied,
            moves_flushed: flushed,
            moves_referenced: referenced,
            recycler_running: 0,
            guest_reads: total(Counter::Reads),
            guest_read_bytes: total(Counter::ReadBytes),
            guest_writes: total(Counter::Writes),
            guest_write_bytes: total(Counter::WriteBytes),
            guest_discards: total(Counter::Discards),
            guest_discard_bytes: total(Counter::DiscardBytes),
            guest_flushes: self.counters.guest_flushes.load(Relaxed),
            device_flushes: self.volume.flushes.load(Relaxed)
                + self.data.volume().map_or(0, |data| data.flushes.load(Relaxed)),
            metadata_read_bytes: self.meta.l2.read_bytes.load(Relaxed),
            metadata_write_bytes: self.meta.written.load(Relaxed),
            moved_bytes: self.moves.completed.load(Relaxed) << bits,
            moves_cancelled: self.moves.cancelled.load(Relaxed),
            erased_bytes: self.counters.erased_bytes.load(Relaxed),
            truncated_bytes: self.counters.truncated_bytes.load(Relaxed),
            compactions: self.counters.compactions.load(Relaxed),
            background_errors: self.counters.background_errors.load(Relaxed),
        }
    }
}
