//! Committing an overlay into its backing file: what the overlay holds is written there, and the overlay is empty
//! afterwards.
//!
//! Durable steps: `the overlay's contents, written to the backing file` → **flush there** → `the overlay's mapping
//! cleared` → **flush here** → its clusters are free.
//!
//! - Cut before the first flush: the backing file holds old and new data in any mixture, and the overlay still hides every
//!   sector of it that differs. Whoever reads through the overlay sees what he saw before.
//! - Cut between: each L1 and L2 entry is the old one, which shows the overlay's data, or a cleared one, which lets the
//!   backing file show: the same data, durable since the first flush.
//! - Cut after the second: the clusters that the overlay had are leaks at worst.

use std::path::Path;

use super::backing::{BackingFile, Located, failed};
use super::{ExtentKind, Image};
use crate::buf::{IoBuf, IoBufMut};
use crate::clusters::scan::Hurry;
use crate::device::BlockDevice;
use crate::device::host::HostFile;
use crate::device::volume::{PIECE, Volume};
use crate::error::{Error, Result};
use crate::format::header::Header;
use crate::mutation::{Mutation, broken};
use crate::options::{BackingPolicy, Options};

/// What a commit did, or has done so far. Sizes are in bytes of the virtual disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommitReport {
    /// How far it is.
    pub done: u64,
    /// Size of the overlay's disk.
    pub total: u64,
    /// Written to the backing file.
    pub written: u64,
    /// Made zero in the backing file.
    pub zeroed: u64,
}

/// Where the overlay's contents go.
#[cfg_attr(feature = "models", allow(clippy::large_enum_variant, reason = "the model checker's locks are large"))]
enum Target<B: BlockDevice> {
    Raw(Volume<B>),
    Image(Box<Image<B>>),
}

/// Writes what the image at `path` holds into its backing file, and empties the image: the disk reads as before, and its
/// contents are in the backing file. A backing file that is shorter than the disk grows. Neither file may be in use.
///
/// Other images with the same backing file read something else afterwards where it has changed: there must be none. The same is
/// true of internal snapshots of the image: wherever one has nothing of its own, it shows the backing file, and so from now on what
/// was committed there.
///
/// `options.backing` must allow backing files, and says where the name starts from. `progress` is called between pieces of
/// at most 1 MiB; returning `false` cancels, with the overlay as it was and its disk unchanged. So does dropping the future, but
/// then nothing closes the files: bitmaps of the two are marked as in use for ever, and so lost.
///
/// # Errors
/// [`Error::BadOption`] if the image has no backing file or `options` do not allow it; [`Error::Backing`] for what happens
/// there; [`Error::Cancelled`]; as [`Image::open`], [`Image::read`] and [`Image::flush`]. After an error the overlay
/// still holds everything, unless it came when the backing file was durable already; the disk reads as before either way.
pub async fn commit(
    path: &Path,
    options: &Options,
    progress: &mut (dyn FnMut(CommitReport) -> bool + Send),
) -> Result<CommitReport> {
    let BackingPolicy::Allow { directory, unrecorded } = &options.backing else {
        return Err(bad("must be allowed for a commit"));
    };
    let above = [path.canonicalize().map_err(Error::io("opening the image file", 0))?];
    let overlay = open_overlay(HostFile::open(path, false)?, options).await?;
    let located = backing_name(&overlay.header)
        .and_then(|name| Located::find(&overlay.header, name, directory, *unrecorded, &above));
    let located = match located {
        Ok(located) => located,
        Err(e) => {
            give_up(&overlay).await;
            return Err(e);
        }
    };
    let writing = Options { discard: true, ..options.clone() };
    let target = async { Target::of(located.open(&writing, *unrecorded, &above).await?).await };
    let target = target.await.map_err(|e| failed(&located.path, e));
    carry_out(&overlay, target, &located.path, progress).await
}

/// The same, with the overlay on a device and its backing file, if that is an image then opened for writing, on another. The
/// option for backing files is not asked. Both are closed when this returns.
///
/// # Errors
/// As [`commit`].
pub async fn commit_into<D: BlockDevice, B: BlockDevice>(
    overlay: D,
    backing: BackingFile<B>,
    options: &Options,
    progress: &mut (dyn FnMut(CommitReport) -> bool + Send),
) -> Result<CommitReport> {
    let overlay = match open_overlay(overlay, options).await {
        Ok(overlay) => overlay,
        Err(e) => {
            if let BackingFile::Image(image) = backing {
                give_up(&image).await;
            }
            return Err(e);
        }
    };
    let name = Path::new(overlay.header.backing_file.as_deref().unwrap_or_default());
    let target = Target::of(backing).await.map_err(|e| failed(name, e));
    carry_out(&overlay, target, name, progress).await
}

fn bad(reason: &str) -> Error {
    Error::BadOption { name: "backing".to_owned(), reason: reason.to_owned() }
}

/// Without its backing file the overlay shows what it holds itself, and nothing here needs to see more.
async fn open_overlay<D: BlockDevice>(device: D, options: &Options) -> Result<Image<D>> {
    let overlay = Image::open(device, Options { backing: BackingPolicy::Skip, ..options.clone() }).await?;
    overlay.ensure_writable()?;
    Ok(overlay)
}

fn backing_name(header: &Header) -> Result<&str> {
    header.backing_file.as_deref().ok_or_else(|| bad("the image has no backing file"))
}

/// An image that was opened for writing is closed after an error: its bitmaps are marked as in use until then, and would be lost.
/// If that fails, there is nothing more to be done for them.
async fn give_up<D: BlockDevice>(image: &Image<D>) {
    let _ = image.close().await;
}

/// All the steps, if the backing file could be opened; both are closed then, whatever comes. Errors of the backing file name its
/// path.
async fn carry_out<D: BlockDevice, B: BlockDevice>(
    overlay: &Image<D>,
    target: Result<Target<B>>,
    path: &Path,
    progress: &mut (dyn FnMut(CommitReport) -> bool + Send),
) -> Result<CommitReport> {
    let target = match target {
        Ok(target) => target,
        Err(e) => {
            give_up(overlay).await;
            return Err(e);
        }
    };
    let done = take_steps(overlay, &target, path, progress).await;
    if done.is_err() {
        if let Target::Image(image) = &target {
            give_up(image).await;
        }
        give_up(overlay).await;
    }
    done
}

async fn take_steps<D: BlockDevice, B: BlockDevice>(
    overlay: &Image<D>,
    target: &Target<B>,
    path: &Path,
    progress: &mut (dyn FnMut(CommitReport) -> bool + Send),
) -> Result<CommitReport> {
    backing_name(&overlay.header)?;
    let report = copy(overlay, target, path, progress).await?;
    if broken(Mutation::EmptyBeforeBase) {
        overlay.empty().await?;
    }
    target.close().await.map_err(|e| failed(path, e))?;
    overlay.empty().await?;
    overlay.close().await?;
    Ok(report)
}

async fn copy<D: BlockDevice, B: BlockDevice>(
    overlay: &Image<D>,
    target: &Target<B>,
    path: &Path,
    progress: &mut (dyn FnMut(CommitReport) -> bool + Send),
) -> Result<CommitReport> {
    let failed = |e| failed(path, e);
    let total = overlay.virtual_size();
    target.reach(total).await.map_err(failed)?;
    let mut report = CommitReport { total, ..CommitReport::default() };
    let mut buffer = vec![0; PIECE];
    while report.done < total {
        if !progress(report) {
            return Err(Error::Cancelled);
        }
        let extent = overlay.extent(report.done, total - report.done).await?;
        let length = match extent.kind {
            ExtentKind::Unallocated => extent.length,
            ExtentKind::Zero => {
                target.zero(report.done, extent.length).await.map_err(failed)?;
                report.zeroed += extent.length;
                extent.length
            }
            ExtentKind::Data { .. } | ExtentKind::Compressed => {
                let length = extent.length.min(PIECE as u64);
                buffer.resize(length as usize, 0);
                overlay.read(report.done, IoBufMut::new(&mut buffer)).await?;
                target.write(report.done, IoBuf::new(&buffer)).await.map_err(failed)?;
                report.written += length;
                length
            }
        };
        report.done += length;
    }
    Ok(report)
}

impl<B: BlockDevice> Target<B> {
    async fn of(file: BackingFile<B>) -> Result<Self> {
        match file {
            BackingFile::Raw(device) => Ok(Target::Raw(Volume::new(device).await?)),
            BackingFile::Image(image) => {
                image.ensure_writable()?;
                Ok(Target::Image(image))
            }
        }
    }

    /// Makes the disk at least `size` bytes long; what is new reads as zeroes.
    async fn reach(&self, size: u64) -> Result<()> {
        match self {
            Target::Raw(volume) if volume.length() < size => volume.truncate(size).await,
            Target::Image(image) if image.virtual_size() < size => image.resize(size, false).await,
            _ => Ok(()),
        }
    }

    async fn write(&self, at: u64, buf: IoBuf<'_>) -> Result<()> {
        match self {
            Target::Raw(volume) => volume.write("writing the backing file", at, buf).await,
            Target::Image(image) => image.write(at, buf).await,
        }
    }

    async fn zero(&self, at: u64, length: u64) -> Result<()> {
        match self {
            Target::Raw(volume) => volume.erase(at, length).await,
            Target::Image(image) => image.write_zeroes(at, length, true).await,
        }
    }

    /// Makes everything durable.
    async fn close(&self) -> Result<()> {
        match self {
            Target::Raw(volume) => volume.flush().await,
            Target::Image(image) => image.close().await,
        }
    }
}

impl<D: BlockDevice> Image<D> {
    /// Unmaps the whole disk, so that it reads as its backing file does, and makes that durable. Snapshots keep what they
    /// have.
    async fn empty(&self) -> Result<()> {
        let _compaction = self.compaction.take_soon().await;
        let _frozen = self.freeze().await;
        self.prepare_changes().await?;
        self.forget_past(0).await?;
        self.commit().await?;
        // Not before: what the overlay showed would be lost where an entry is not cleared durably.
        self.punch_data().await?;
        // Closing cuts off what is free at the end, as far as it is known.
        self.find_junk(&mut Hurry).await
    }
}
