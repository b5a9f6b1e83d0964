//! The guest's disk: opening, reading, writing, discarding, flushing, resizing, closing.

mod backing;
mod bitmaps;
mod close;
mod commit;
mod compaction_turn;
pub(crate) mod compress;
pub mod create;
pub(crate) mod data_file;
mod discard;
pub(crate) mod encryption;
mod extents;
mod flush;
mod gate;
mod info;
mod length;
pub(crate) mod mapping;
mod obstacles;
mod open;
mod outside;
pub(crate) mod packed;
pub(crate) mod plan;
mod read;
pub(crate) mod relocate;
mod resize;
pub(crate) mod shared;
pub(crate) mod snapshots;
mod structure;
mod subclusters;
pub(crate) mod turns;
mod upgrade;
mod vacated;
mod write;

pub use backing::BackingFile;
pub use bitmaps::BitmapInfo;
pub use commit::{CommitReport, commit, commit_into};
pub use create::{CreateOptions, DataFileOptions, create, create_with_data};
pub use extents::{Extent, ExtentKind};
pub use info::Info;
pub use snapshots::SnapshotInfo;
pub use upgrade::upgrade;

use crate::check::{CheckReport, Repair};
use crate::clusters::Clusters;
use crate::clusters::epochs::Epochs;
use crate::clusters::moves::ActiveMoves;
use crate::clusters::set::ClusterSet;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::{Error, Result};
use crate::format::header::Header;
use crate::metadata::Metadata;
use crate::options::{Logger, Options};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{AsyncMutex, AsyncMutexGuard, Mutex, Notify};
use backing::Backing;
use bitmaps::Bitmaps;
use compaction_turn::CompactionTurn;
use data_file::DataFile;
use encryption::Encryption;
use obstacles::{Obstacle, Obstacles};
use structure::{Frozen, Structure};
use turns::Turns;
use vacated::Vacated;

/// An open image on a device of type `D`. All calls take `&self`; any number of tasks and threads may make them at once.
///
/// Dropping an image without [`close`](Image::close) loses nothing that was flushed; the next opening then looks for
/// clusters that leaked.
pub struct Image<D: BlockDevice> {
    pub(crate) volume: Volume<D>,
    pub(crate) meta: Metadata,
    pub(crate) clusters: Clusters,
    pub(crate) epochs: Epochs,
    pub(crate) moves: ActiveMoves,
    pub(crate) options: Options,
    pub(crate) counters: Counters,
    /// What the header said when the image was opened.
    header: Header,
    /// `incompatible_features` without the dirty bit.
    incompatible: u64,
    compression_type: u8,
    /// The internal snapshots.
    snapshots: Mutex<snapshots::Snapshots>,
    /// In a damaged image, what snapshots refer to as L2 tables and the image needs for something else: the disk's own L2 tables,
    /// or tables of another kind. No other lock is taken under this one.
    disputed: Mutex<ClusterSet>,
    /// Whether the L2 tables that they refer to are among `meta.tables`: see `note_snapshot_tables`.
    snapshot_tables_noted: AsyncMutex<bool>,
    virtual_size: AtomicU64,
    /// How guest data is encrypted.
    pub(crate) encryption: Encryption,
    /// How long a request may be whose data is transferred as it is, within one cluster: the cluster size, or 0 if data is
    /// encrypted.
    plain_span: u64,
    backing: Backing,
    /// Where guest data is, if not in the image.
    pub(crate) data: DataFile<D>,
    /// What of an encrypted data file is to be given back.
    pub(crate) vacated: Mutex<Vacated>,
    pub(crate) bitmaps: Bitmaps,
    /// What requests must heed.
    pub(crate) obstacles: Obstacles,
    panicked: AtomicBool,
    /// Whether the image is marked as being changed: see `prepare_changes`.
    prepared: AtomicBool,
    /// Closed while nobody may write.
    pub(crate) gate: gate::Gate,
    /// Guest clusters that a request is allocating (but for first writes that are made at once).
    allocating: Turns,
    /// Room for compressed data.
    room: AsyncMutex<compress::Room>,
    /// L1 entries whose L2 table a request is making or copying.
    table_turns: Turns,
    /// Shared by requests that change the mapping, frozen by those that need it to stand still. A grace period is never awaited
    /// while it is frozen: requests that wait for it are in flight. (But by `close`, after the last request.)
    structure: Structure,
    pub(crate) compaction: CompactionTurn,
    /// Notified when there may be something for the recycler to do.
    pub(crate) work: Notify,
}

/// Counters that are not on a hot path.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) guest_flushes: AtomicU64,
    pub(crate) erased_bytes: AtomicU64,
    pub(crate) truncated_bytes: AtomicU64,
    pub(crate) compactions: AtomicU64,
    pub(crate) background_errors: AtomicU64,
}

impl<D: BlockDevice> Image<D> {
    /// The device that holds the image.
    pub fn device(&self) -> &D {
        self.volume.device()
    }

    /// Where messages about this image go.
    pub fn logger(&self) -> &Logger {
        &self.options.logger
    }

    /// Size of the virtual disk in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size.load(Ordering::Acquire)
    }

    /// Length of the image file in bytes; on a device that cannot be resized, the length that the image needs.
    pub(crate) fn file_size(&self) -> u64 {
        if self.volume.can_resize() || self.options.read_only {
            self.volume.length()
        } else {
            self.clusters.lock().end << self.meta.geometry.cluster_bits
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.obstacles.has(Obstacle::Closed)
    }

    /// Whether the image takes changes.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::ReadOnly`], or [`Error::Failed`] after a failed flush.
    pub fn ensure_writable(&self) -> Result<()> {
        if self.is_closed() {
            return Err(Error::Closed);
        }
        if self.options.read_only {
            return Err(Error::ReadOnly);
        }
        self.volume.ensure_sound()
    }

    /// Waits for the turn to move, erase or cut off clusters. The image may have been closed meanwhile, which is an error.
    pub(crate) async fn recycler_turn(&self) -> Result<AsyncMutexGuard<'_, ()>> {
        let turn = self.compaction.take().await;
        self.ensure_writable()?;
        Ok(turn)
    }

    /// The same, for who makes the caller of a function wait for it.
    pub(crate) async fn recycler_turn_soon(&self) -> Result<AsyncMutexGuard<'_, ()>> {
        let turn = self.compaction.take_soon().await;
        self.ensure_writable()?;
        Ok(turn)
    }

    /// Waits until nobody changes the mapping, and keeps it so. The caller has the recycler's turn.
    pub(crate) async fn freeze(&self) -> Frozen<'_> {
        self.structure.freeze(&self.obstacles, &self.meta.l2).await
    }

    /// Checks the image while it is open: everything is written back, then the file is read as any other program would
    /// read it. Requests that change the mapping wait meanwhile, and so does the recycler; reads and overwrites go on.
    ///
    /// Clusters that are counted ahead for guest writes are no leaks here: they are given back when the image is closed.
    ///
    /// # Errors
    /// [`Error::Closed`]; as [`flush`](Self::flush); as [`check`](crate::check::check).
    pub async fn check(&self) -> Result<CheckReport> {
        if self.is_closed() {
            return Err(Error::Closed);
        }
        let _compaction = self.compaction.take_soon().await;
        let _frozen = self.freeze().await;
        let mut ahead = 0;
        if !self.options.read_only {
            self.leave_room().await;
            self.commit().await?;
            ahead = self.write_back_for_check().await?;
        }
        let mut report = crate::check::check(self.volume.device(), Repair::No).await?;
        report.leaks = report.leaks.saturating_sub(ahead);
        if ahead > 0 && report.leaks == 0 {
            report.messages.retain(|m| !m.contains(" is leaked: "));
        }
        Ok(report)
    }

    /// Writes everything back, and returns how many clusters the file may count, and link from nowhere, on purpose. The
    /// caller has frozen the mapping, and has the recycler's turn.
    async fn write_back_for_check(&self) -> Result<u64> {
        let mut turn = self.meta.exclusive_turn().await;
        // Looked at on both sides of the commit: while it goes on, a request may end, and a cluster that waited for it be
        // uncounted in memory, which the file does not show; and the commit frees tables that it moved. Until the turn ends
        // no other commit does so, and later ones only lower the counts in the file.
        let (mut ahead, shared) = {
            let states = self.clusters.lock();
            (states.counted_ahead(), states.shared_len())
        };
        self.commit_in_turn(&mut turn, None).await?;
        ahead.add_all(&self.clusters.lock().counted_ahead());
        Ok(ahead.len() + shared)
    }
}
