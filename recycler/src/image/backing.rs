//! Backing files: where the contents of unallocated clusters come from.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use super::Image;
use crate::buf::IoBufMut;
use crate::device::host::HostFile;
use crate::device::volume::Volume;
use crate::error::{Error, Result};
use crate::format::header::Header;
use crate::options::{BackingFormat, BackingPolicy, DataFilePolicy, Options};

/// A chain of backing files may be this long.
const MAX_DEPTH: usize = 64;

/// What is behind an image.
#[cfg_attr(feature = "models", allow(clippy::large_enum_variant, reason = "the model checker's locks are large"))]
pub(crate) enum Backing {
    /// Nothing: unallocated clusters read as zeroes.
    None,
    /// A file of this name that was not opened.
    Skipped(String),
    /// A raw file.
    Raw(Volume<HostFile>),
    /// Another image.
    Image(Box<Image<HostFile>>),
}

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

    /// Options for an image that is behind one opened with `options`.
    pub(super) fn options(&self, options: &Options, unrecorded: Option<BackingFormat>) -> Options {
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
        let failed = |source| failed(&located.path, source);
        let file = HostFile::open(&located.path, true).map_err(failed)?;
        match located.format {
            BackingFormat::Raw => Ok(Backing::Raw(Volume::new(file).await.map_err(failed)?)),
            BackingFormat::Qcow2 => {
                let options = Options { read_only: true, ..located.options(options, unrecorded) };
                let above = [above, std::slice::from_ref(&located.path)].concat();
                Ok(Backing::Image(Box::new(open_boxed(file, options, above).await.map_err(failed)?)))
            }
        }
    }

    /// Whether there is a backing file, opened or not.
    pub(crate) fn exists(&self) -> bool {
        !matches!(self, Backing::None)
    }

    /// Whether an image in it is encrypted; unknown if it was skipped.
    pub(super) fn uses_passphrase(&self) -> bool {
        match self {
            Backing::None | Backing::Raw(_) => false,
            Backing::Skipped(_) => true,
            Backing::Image(image) => image.uses_passphrase(),
        }
    }

    /// Its size in bytes; unknown, so endless, if it was skipped.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Backing::None => 0,
            Backing::Skipped(_) => u64::MAX,
            Backing::Raw(volume) => volume.length(),
            Backing::Image(image) => image.virtual_size(),
        }
    }

    /// Whether everything from byte `at` on is certain to read as zeroes.
    pub(crate) fn is_zero_from(&self, at: u64) -> bool {
        at >= self.size()
    }

    /// Fills `buf` from byte `at`; what lies past the end reads as zeroes.
    pub(crate) async fn read(&self, at: u64, mut buf: IoBufMut<'_>) -> Result<()> {
        let wanted = buf.len();
        match self {
            Backing::None => buf.fill_zero(),
            Backing::Skipped(path) => {
                let reason = "its contents are needed".to_owned();
                return Err(Error::BackingNotAllowed { path: path.clone(), reason });
            }
            Backing::Raw(volume) => volume.read("reading the backing file", at, buf).await?,
            Backing::Image(image) => {
                let there = image.virtual_size().saturating_sub(at).min(wanted as u64) as usize;
                if there > 0 {
                    read_boxed(image, at, buf.slice(0..there)).await?;
                }
                buf.slice(there..wanted).fill_zero();
            }
        }
        Ok(())
    }
}

type Boxed<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

// An image may have an image behind it, so its futures are recursive: these two are boxed.

fn open_boxed(file: HostFile, options: Options, above: Vec<PathBuf>) -> Boxed<'static, Image<HostFile>> {
    Box::pin(async move { Image::open_above(file, None, options, &above).await })
}

fn read_boxed<'a>(image: &'a Image<HostFile>, at: u64, buf: IoBufMut<'a>) -> Boxed<'a, ()> {
    Box::pin(async move {
        let _request = image.epochs.enter();
        image.read_range(at, buf).await
    })
}
