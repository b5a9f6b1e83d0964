//! External data files: the file that holds an image's guest data, if the image does not, how it is opened, and its length. What
//! requests do there: see `outside`.

use std::path::{Path, PathBuf};

use super::Image;
use super::discard::Clear;
use super::mapping::Purpose;
use super::outside::{PIECE, pieces};
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::{Error, Result};
use crate::format::header::Header;
use crate::options::{DataFilePolicy, Options};

/// Where guest data is.
#[cfg_attr(feature = "models", allow(clippy::large_enum_variant, reason = "the model checker's locks are large"))]
pub(crate) enum DataFile<D> {
    /// In the image.
    None,
    /// In a file of this name that was not opened.
    Skipped(String),
    /// In this file.
    Open(Volume<D>),
}

impl<D: BlockDevice> DataFile<D> {
    /// Opens what the header names, as far as the policy allows, or takes the device that the program gave. `image` is the
    /// image's own device; those at the paths `above` are in front of it.
    pub(super) async fn open(
        header: &Header,
        image: &D,
        given: Option<D>,
        options: &Options,
        above: &[PathBuf],
    ) -> Result<Self> {
        if !header.has_data_file() {
            return match given {
                None => Ok(DataFile::None),
                Some(_) => Err(bad("the image has no external data file")),
            };
        }
        if let Some(device) = given {
            return DataFile::Open(Volume::new(device).await?).large_enough(header, options);
        }
        let name = header.data_file.clone();
        let directory = match &options.data_file {
            DataFilePolicy::Refuse => {
                let reason = "the caller did not allow external data files".to_owned();
                return Err(Error::DataFileNotAllowed { path: name.unwrap_or_default(), reason });
            }
            DataFilePolicy::Skip => return Ok(DataFile::Skipped(name.unwrap_or_default())),
            DataFilePolicy::Allow { directory } => directory,
        };
        let Some(name) = name else {
            return Err(Error::unsupported("an external data file that the image does not name"));
        };
        let path = find(image, &name, directory, above)?;
        let failed = |source| Error::DataFile { path: path.display().to_string(), source: Box::new(source) };
        let device = image.beside(&path, options.read_only).ok_or_else(|| Error::DataFileNotAllowed {
            path: name.clone(),
            reason: "the image is not a file of the host: its data file must be given with it".to_owned(),
        })?;
        let volume = Volume::new(device.map_err(failed)?).await.map_err(failed)?;
        DataFile::Open(volume).large_enough(header, options)
    }

    /// Refuses a file that cannot hold the disk; whatever a file lacks that is only read reads as zeroes.
    fn large_enough(self, header: &Header, options: &Options) -> Result<Self> {
        match self.volume().filter(|v| !options.read_only && !v.can_resize() && v.length() < header.virtual_size) {
            None => Ok(self),
            Some(volume) => Err(too_short(volume.length(), header.virtual_size)),
        }
    }

    /// The file, if guest data is in one of its own that is open.
    #[inline]
    pub(crate) fn volume(&self) -> Option<&Volume<D>> {
        match self {
            DataFile::Open(volume) => Some(volume),
            _ => None,
        }
    }

    /// Makes the file as long as the disk, so that no write of a guest's ever has to.
    pub(super) async fn reach(&self, size: u64) -> Result<()> {
        let Some(volume) = self.volume().filter(|v| v.length() < size) else { return Ok(()) };
        if !volume.can_resize() {
            return Err(too_short(volume.length(), size));
        }
        volume.truncate(size).await
    }
}

fn too_short(length: u64, size: u64) -> Error {
    Error::unsupported(format!("an external data file of {length} bytes that cannot grow, for a disk of {size}"))
}

fn bad(reason: &str) -> Error {
    Error::BadOption { name: "data".to_owned(), reason: reason.to_owned() }
}

/// The path of a data file, symbolic links resolved. Nothing is opened.
fn find<D: BlockDevice>(image: &D, name: &str, directory: &Path, above: &[PathBuf]) -> Result<PathBuf> {
    let refused = |reason: &str| Error::DataFileNotAllowed { path: name.to_owned(), reason: reason.to_owned() };
    if !super::backing::is_plain_path(name) {
        return Err(refused("the name is not a plain path"));
    }
    let path = directory.join(name);
    let path = path.canonicalize().map_err(|source| Error::DataFile {
        path: path.display().to_string(),
        source: Box::new(Error::io("opening it", 0)(source)),
    })?;
    if image.host_file().is_some_and(|file| file.is_at(&path)) {
        return Err(refused("it is the image itself"));
    }
    if above.contains(&path) {
        return Err(refused("it is one of the images in front of it"));
    }
    Ok(path)
}

impl<D: BlockDevice> Image<D> {
    /// Where guest data is.
    #[inline]
    pub(crate) fn guest_volume(&self) -> &Volume<D> {
        self.data.volume().unwrap_or(&self.volume)
    }

    /// The data file.
    ///
    /// # Errors
    /// It was not opened.
    pub(super) fn data_volume(&self) -> Result<&Volume<D>> {
        match &self.data {
            DataFile::Open(volume) => Ok(volume),
            DataFile::Skipped(name) => {
                let reason = "the disk's contents are in it".to_owned();
                Err(Error::DataFileNotAllowed { path: name.clone(), reason })
            }
            DataFile::None => Err(bad("the image has no external data file")),
        }
    }

    /// Makes durable what has been written to the data file, if there is one. If that fails, the image takes no changes any more.
    pub(super) async fn flush_data(&self) -> Result<()> {
        let Some(data) = self.data.volume() else { return Ok(()) };
        data.flush().await.inspect_err(|e| self.volume.fail(|| e.to_string()))
    }

    /// Fails if the contents of the disk cannot be reached.
    pub(super) fn ensure_data(&self) -> Result<()> {
        if self.meta.external { self.data_volume().map(|_| ()) } else { Ok(()) }
    }

    /// Whether the data file reads as the disk does, without the image, and so without the entries. An encrypted one
    /// cannot, since zeroes in it read as something else: in such an image the entries say what is zero, whatever the
    /// header says.
    pub(super) fn data_is_disk(&self) -> bool {
        self.header.has_raw_data_file() && !self.encryption.is_on()
    }

    /// Whether a request that was looked up so is for a cluster of the image, and not of the data file: then moves concern it.
    #[inline]
    pub(super) fn may_move(&self, purpose: Purpose) -> bool {
        purpose == Purpose::Write && !self.meta.external
    }

    /// The disk is to be `size` bytes long instead of `old`: what becomes part of it is made zero where the data file is raw,
    /// and the file made as long.
    pub(super) async fn grow_data(&self, size: u64, old: u64) -> Result<()> {
        if self.header.has_raw_data_file() {
            self.clear_outside(old..size, Clear::Unmap).await?;
        }
        self.data.reach(size).await
    }

    /// The disk has `size` bytes now, durably, and nothing past them is in use: the data file is cut, if it ended where the disk
    /// did before, or in its last cluster. What it had beyond that is none of the disk's.
    ///
    /// Cut before the new length is durable: the file is longer than the disk, which is no error.
    pub(super) async fn cut_data(&self, size: u64, old: u64) -> Result<()> {
        let Some(volume) = self.data.volume() else { return Ok(()) };
        let mut length = volume.length();
        if volume.can_resize() && length <= old.next_multiple_of(self.meta.geometry.cluster_size()) {
            while length > size {
                length = size.max(length.saturating_sub(PIECE));
                volume.truncate(length).await?;
            }
            return Ok(());
        }
        for piece in pieces(size..old) {
            volume.punch(piece.start, piece.end - piece.start).await?;
        }
        Ok(())
    }

    /// Gives the space of the whole data file back. No entry names any of it, durably.
    pub(super) async fn punch_data(&self) -> Result<()> {
        let Some(volume) = self.data.volume() else { return Ok(()) };
        for piece in pieces(0..self.virtual_size()) {
            volume.punch(piece.start, piece.end - piece.start).await?;
        }
        Ok(())
    }
}
