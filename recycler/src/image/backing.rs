//! Backing files: where the contents of unallocated clusters come from.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use super::Image;
use super::open::Given;
use crate::buf::IoBufMut;
use crate::device::BlockDevice;
use crate::device::host::HostFile;
use crate::device::volume::Volume;
use crate::error::{Error, Result};
use crate::format::header::Header;
use crate::options::{BackingFormat, BackingPolicy, DataFilePolicy, Options};

/// A chain of backing files may be this long.
const MAX_DEPTH: usize = 64;

/// A file behind an image, on a device: what shows through where the image holds nothing.
#[cfg_attr(feature = "models", allow(clippy::large_enum_variant, reason = "the model checker's locks are large"))]
pub enum BackingFile<D: BlockDevice> {
    /// The disk as it is.
    Raw(D),
    /// Another image, open, with what is behind it in turn.
    Image(Box<Image<D>>),
}

/// What is behind an image.
pub(crate) enum Backing {
    /// Nothing: unallocated clusters read as zeroes.
    None,
    /// A file of this name that was not opened.
    Skipped(String),
    /// A file, on whatever device, which need not be of the image's own type.
    Open(Box<dyn Behind>),
}

/// A disk that is only read.
pub(crate) trait Behind: Send + Sync {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Whether it is encrypted, or something behind it is.
    fn uses_passphrase(&self) -> bool;

    /// Fills `buf` from byte `at`; what lies past the end reads as zeroes.
    fn read<'a>(&'a self, at: u64, buf: IoBufMut<'a>) -> Boxed<'a, ()>;
}

/// An image may have an image behind it, so its futures are recursive: those that lead there are boxed.
type Boxed<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// Where a backing file is, and what it is.
pub(super) struct Located {
    /// Its path, with symbolic links resolved.
    pub(super) path: PathBuf,
    pub(super) format: BackingFormat,
}

impl Located {
    /// Finds what the header names, relative to `directory`, below the images at the paths `above`. Nothing is opened.
    pub(super) fn find(
        header: &Header,
        name: &str,
        directory: &Path,
        unrecorded: Option<BackingFormat>,
        above: &[PathBuf],
    ) -> Result<Located> {
        let refused = |reason: &str| Error::BackingNotAllowed { path: name.to_owned(), reason: reason.to_owned() };
        if !is_plain_path(name) {
            return Err(refused("the name is not a plain path"));
        }
        let format = match &header.backing_format {
            Some(format) => BackingFormat::from_name(format)
                .ok_or_else(|| Error::unsupported(format!("a backing file of format {format:?}")))?,
            None => unrecorded.ok_or_else(|| {
                refused("the image does not record its format, the caller named none, and formats are never guessed")
            })?,
        };
        let path = directory.join(name);
        let path = path.canonicalize().map_err(|e| failed(&path, Error::io("opening it", 0)(e)))?;
        if above.contains(&path) {
            return Err(refused("the chain of backing files is a loop"));
        }
        if above.len() >= MAX_DEPTH {
            return Err(refused("the chain of backing files is too long"));
        }
        Ok(Located { path, format })
    }

    /// Opens it behind the images at the paths `above`, which were opened with `options`.
    pub(super) async fn open(
        &self,
        options: &Options,
        unrecorded: Option<BackingFormat>,
        above: &[PathBuf],
    ) -> Result<BackingFile<HostFile>> {
        let file = HostFile::open(&self.path, options.read_only)?;
        match self.format {
            BackingFormat::Raw => Ok(BackingFile::Raw(file)),
            BackingFormat::Qcow2 => {
                let above = [above, std::slice::from_ref(&self.path)].concat();
                let image = open_boxed(file, self.options(options, unrecorded), above).await?;
                Ok(BackingFile::Image(Box::new(image)))
            }
        }
    }

    /// Options for an image that is behind one opened with `options`.
    fn options(&self, options: &Options, unrecorded: Option<BackingFormat>) -> Options {
        let directory = self.path.parent().unwrap_or(Path::new("/")).to_owned();
        let data_file = match &options.data_file {
            DataFilePolicy::Allow { .. } => DataFilePolicy::Allow { directory: directory.clone() },
            other => other.clone(),
        };
        let backing = BackingPolicy::Allow { directory, unrecorded };
        Options { check_on_connect: false, backing, data_file, ..options.clone() }
    }
}

/// Whether a name in an image is a path and nothing else: not `json:{...}`, not `nbd://...`. A colon before the first slash would
/// be a protocol to QEMU.
pub(super) fn is_plain_path(name: &str) -> bool {
    !name.split('/').next().is_some_and(|first| first.contains(':'))
}

/// An error of the backing file at `path`.
pub(super) fn failed(path: &Path, source: Error) -> Error {
    Error::Backing { path: path.display().to_string(), source: Box::new(source) }
}

impl<D: BlockDevice> BackingFile<D> {
    /// To be read.
    async fn behind(self) -> Result<Backing> {
        Ok(Backing::Open(match self {
            BackingFile::Raw(device) => Box::new(Volume::new(device).await?),
            BackingFile::Image(image) => image,
        }))
    }
}

impl Backing {
    /// Opens what the header names, as far as the policy allows.
    pub(crate) async fn open(header: &Header, options: &Options, above: &[PathBuf]) -> Result<Backing> {
        let Some(name) = &header.backing_file else { return Ok(Backing::None) };
        let (directory, unrecorded) = match &options.backing {
            BackingPolicy::Refuse => {
                let reason = "the caller did not allow backing files".to_owned();
                return Err(Error::BackingNotAllowed { path: name.clone(), reason });
            }
            BackingPolicy::Skip => return Ok(Backing::Skipped(name.clone())),
            BackingPolicy::Allow { directory, unrecorded } => (directory, *unrecorded),
        };
        let located = Located::find(header, name, directory, unrecorded, above)?;
        let options = Options { read_only: true, ..options.clone() };
        let opened = async { located.open(&options, unrecorded, above).await?.behind().await };
        opened.await.map_err(|e| failed(&located.path, e))
    }

    /// Takes the file that the program gave for what the header names, whatever the header calls it.
    pub(super) async fn given<D: BlockDevice>(header: &Header, file: BackingFile<D>) -> Result<Backing> {
        let bad = |reason: &str| Error::BadOption { name: "backing".to_owned(), reason: reason.to_owned() };
        let Some(name) = &header.backing_file else { return Err(bad("the image has no backing file")) };
        if matches!(&file, BackingFile::Image(image) if !image.options.read_only) {
            return Err(bad("is open for writing"));
        }
        file.behind().await.map_err(|e| failed(Path::new(name), e))
    }

    /// Whether there is a backing file, opened or not.
    pub(crate) fn exists(&self) -> bool {
        !matches!(self, Backing::None)
    }

    /// Whether an image in it is encrypted; unknown if it was skipped.
    pub(super) fn uses_passphrase(&self) -> bool {
        match self {
            Backing::None => false,
            Backing::Skipped(_) => true,
            Backing::Open(file) => file.uses_passphrase(),
        }
    }

    /// Its size in bytes; unknown, so endless, if it was skipped.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Backing::None => 0,
            Backing::Skipped(_) => u64::MAX,
            Backing::Open(file) => file.size(),
        }
    }

    /// Whether everything from byte `at` on is certain to read as zeroes.
    pub(crate) fn is_zero_from(&self, at: u64) -> bool {
        at >= self.size()
    }

    /// Fills `buf` from byte `at`; what lies past the end reads as zeroes.
    pub(crate) async fn read(&self, at: u64, mut buf: IoBufMut<'_>) -> Result<()> {
        match self {
            Backing::None => {
                buf.fill_zero();
                Ok(())
            }
            Backing::Skipped(path) => {
                let reason = "its contents are needed".to_owned();
                Err(Error::BackingNotAllowed { path: path.clone(), reason })
            }
            Backing::Open(file) => file.read(at, buf).await,
        }
    }
}

impl<D: BlockDevice> Behind for Volume<D> {
    fn size(&self) -> u64 {
        self.length()
    }

    fn uses_passphrase(&self) -> bool {
        false
    }

    fn read<'a>(&'a self, at: u64, buf: IoBufMut<'a>) -> Boxed<'a, ()> {
        Box::pin(async move { Volume::read(self, "reading the backing file", at, buf).await })
    }
}

impl<D: BlockDevice> Behind for Image<D> {
    fn size(&self) -> u64 {
        self.virtual_size()
    }

    fn uses_passphrase(&self) -> bool {
        Image::uses_passphrase(self)
    }

    fn read<'a>(&'a self, at: u64, mut buf: IoBufMut<'a>) -> Boxed<'a, ()> {
        Box::pin(async move {
            let wanted = buf.len();
            let there = self.virtual_size().saturating_sub(at).min(wanted as u64) as usize;
            if there > 0 {
                let _request = self.epochs.enter();
                self.read_range(at, buf.slice(0..there)).await?;
            }
            buf.slice(there..wanted).fill_zero();
            Ok(())
        })
    }
}

fn open_boxed(file: HostFile, options: Options, above: Vec<PathBuf>) -> Boxed<'static, Image<HostFile>> {
    Box::pin(async move { Image::open_above(file, Given::default(), options, &above).await })
}
