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
use crate::options::{BackingPolicy, Options};

/// A chain of backing files may be this long.
const MAX_DEPTH: usize = 64;

/// What is behind an image.
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

impl Backing {
    /// Opens what the header names, as far as the policy allows.
    pub(crate) async fn open(header: &Header, options: &Options, above: &[PathBuf]) -> Result<Backing> {
        let Some(name) = &header.backing_file else { return Ok(Backing::None) };
        let refused = |reason: &str| Error::BackingNotAllowed { path: name.clone(), reason: reason.to_owned() };
        let directory = match &options.backing {
            BackingPolicy::Refuse => return Err(refused("the caller did not allow backing files")),
            BackingPolicy::Skip => return Ok(Backing::Skipped(name.clone())),
            BackingPolicy::Allow { directory } => directory,
        };
        // The name is a path and nothing else: not `json:{...}`, not `nbd://...`. A colon before the first slash would be a
        // protocol to QEMU.
        if name.split('/').next().is_some_and(|first| first.contains(':')) {
            return Err(refused("the name is not a plain path"));
        }
        let Some(format) = &header.backing_format else {
            return Err(refused("the image does not record its format, and formats are never guessed"));
        };
        let path = directory.join(name);
        let failed = |source: Error| Error::Backing { path: path.display().to_string(), source: Box::new(source) };
        let place = path.canonicalize().map_err(|e| failed(Error::io("opening it", 0)(e)))?;
        if above.contains(&place) {
            return Err(refused("the chain of backing files is a loop"));
        }
        if above.len() >= MAX_DEPTH {
            return Err(refused("the chain of backing files is too long"));
        }
        let file = HostFile::open(&place, true).map_err(failed)?;
        match format.as_str() {
            "raw" => Ok(Backing::Raw(Volume::new(file).await.map_err(failed)?)),
            "qcow2" => {
                let directory = place.parent().unwrap_or(Path::new("/")).to_owned();
                let options = Options {
                    read_only: true,
                    check_on_connect: false,
                    backing: BackingPolicy::Allow { directory },
                    ..options.clone()
                };
                let mut above = above.to_vec();
                above.push(place);
                Ok(Backing::Image(Box::new(open_boxed(file, options, above).await.map_err(failed)?)))
            }
            other => Err(Error::unsupported(format!("a backing file of format {other:?}"))),
        }
    }

    /// Whether there is a backing file, opened or not.
    pub(crate) fn exists(&self) -> bool {
        !matches!(self, Backing::None)
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
    Box::pin(async move { Image::open_above(file, options, &above).await })
}

fn read_boxed<'a>(image: &'a Image<HostFile>, at: u64, buf: IoBufMut<'a>) -> Boxed<'a, ()> {
    Box::pin(async move {
        let _request = image.epochs.enter();
        image.read_range(at, buf).await
    })
}
