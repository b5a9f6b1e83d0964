//! How an image is opened and how its recycler behaves.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::passphrase::Passphrase;

/// Whether, and from where, a backing file may be opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BackingPolicy {
    /// Opening an image that has a backing file fails.
    #[default]
    Refuse,
    /// The image is opened without its backing file: a request that needs its contents fails, everything else works.
    Skip,
    /// The backing file is opened read-only, with the format that the image records (never guessed), relative to this
    /// directory; so are the backing files of backing files, each relative to its own image.
    Allow {
        /// The directory relative names start from: normally the image's own.
        directory: PathBuf,
        /// The format of backing files whose images do not record one; `None`: they are refused.
        unrecorded: Option<BackingFormat>,
    },
}

/// Whether, and from where, an external data file may be opened: the file that holds an image's guest data, if the image names
/// one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DataFilePolicy {
    /// Opening an image that has an external data file fails.
    #[default]
    Refuse,
    /// The image is opened without its data file: requests of guests fail, everything else works, compacting included.
    Skip,
    /// The data file is opened relative to this directory, for writing too, unless the image is opened read-only. So are
    /// those of backing files, read-only and each relative to its own image.
    Allow {
        /// The directory relative names start from: normally the image's own.
        directory: PathBuf,
    },
}

/// The format of a backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingFormat {
    /// The bytes of the disk, one after another.
    Raw,
    /// Another image.
    Qcow2,
}

impl BackingFormat {
    /// By the name that images record; `None` for any other.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(BackingFormat::Raw),
            "qcow2" => Some(BackingFormat::Qcow2),
            _ => None,
        }
    }
}

/// How serious a message of the library is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something unexpected that the library handled.
    Warning,
    /// A milestone of the recycler's work.
    Info,
    /// Every step of it.
    Debug,
}

type Sink = dyn Fn(LogLevel, &str) + Send + Sync;

/// Where messages go; called without any library lock held, from any thread.
#[derive(Clone, Default)]
pub struct Logger(Option<Arc<Sink>>);

impl Logger {
    /// Sends messages to `sink`.
    pub fn new(sink: impl Fn(LogLevel, &str) + Send + Sync + 'static) -> Self {
        Logger(Some(Arc::new(sink)))
    }

    pub(crate) fn log(&self, level: LogLevel, message: impl FnOnce() -> String) {
        if let Some(sink) = &self.0 {
            sink(level, &message());
        }
    }
}

impl fmt::Debug for Logger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Logger(..)" } else { "Logger(none)" })
    }
}

/// How an image is opened and how its recycler behaves. All sizes are in bytes.
#[derive(Clone, Debug)]
pub struct Options {
    /// Refuse every change; nothing is written to the image, not even to repair it.
    pub read_only: bool,
    /// Transfers of an image in a host file pass the host's page cache (O_DIRECT). For those who open the file: see
    /// [`HostFile::into_direct`](crate::device::host::HostFile::into_direct).
    pub direct: bool,
    /// Accept discards. Without it, [`discard`](crate::Image::discard) fails as unsupported.
    pub discard: bool,
    /// How many bytes of zeroed clusters the recycler keeps ready for new guest writes.
    pub keep_erased: u64,
    /// The recycler compacts on its own when more than this many bytes are free inside the file; `None`: only when asked.
    pub compact_after_unmaps: Option<u64>,
    /// How long the amount of free space must not have grown before an automatic compaction begins. If it grows all the time, one
    /// begins after twelve times as long.
    pub settle_time: Duration,
    /// The recycler flushes this long after the first unflushed work, unless the guest flushes first.
    pub flush_after: Duration,
    /// The most bytes a second that the recycler copies and erases; `None`: no limit.
    pub rate_limit: Option<u64>,
    /// The recycler gives the space of clusters that were freed, and stay in the file, back to the host by punching holes,
    /// where the device can do that.
    pub punch_junk: bool,
    /// Memory for cached L2 tables, in bytes.
    pub l2_cache_size: u64,
    /// Check the whole image when it is opened and refuse it if it is corrupt.
    pub check_on_connect: bool,
    /// Check the library's own invariants while it works (slow; for tests).
    pub runtime_asserts: bool,
    /// Backing files.
    pub backing: BackingPolicy,
    /// An external data file. Not asked where the program gives the device that holds the guest data itself.
    pub data_file: DataFilePolicy,
    /// The passphrase of an encrypted image, and of encrypted images behind it. Without it an encrypted image can be
    /// opened, looked at, checked, discarded from and made shorter, and neither read nor written. The image keeps none
    /// once it is open. With QEMU's first encryption (AES) nothing tells whether a passphrase is right: a wrong one reads
    /// garbage.
    pub passphrase: Option<Passphrase>,
    /// A name for statistics and messages.
    pub id: String,
    /// Where messages go.
    pub logger: Logger,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            read_only: false,
            direct: false,
            discard: true,
            keep_erased: 16 << 20,
            compact_after_unmaps: Some(64 << 20),
            settle_time: Duration::from_secs(5),
            flush_after: Duration::from_secs(5),
            rate_limit: None,
            punch_junk: true,
            l2_cache_size: 4 << 20,
            check_on_connect: false,
            runtime_asserts: false,
            backing: BackingPolicy::Refuse,
            data_file: DataFilePolicy::Refuse,
            passphrase: None,
            id: String::new(),
            logger: Logger::default(),
        }
    }
}

/// Sizes in the configuration string are in sectors of this many bytes.
pub const CONFIG_SECTOR: u64 = 512;

impl Options {
    /// Applies a configuration string `key=value;key=value;...`, as mirage/ocaml-qcow takes it.
    ///
    /// | key | value |
    /// |---|---|
    /// | `direct`, `discard`, `punch_junk`, `read_only`, `runtime_asserts`, `check_on_connect` | `true`, `false`, `1`, `0` |
    /// | `keep_erased` | **sectors of 512 bytes** kept erased |
    /// | `compact_after_unmaps` | **sectors of 512 bytes** that must be free; `0` turns automatic compaction off |
    /// | `id` | a name |
    /// | `settle_ms`, `flush_ms` | milliseconds |
    /// | `rate_limit` | bytes per second; `0` is no limit |
    /// | `l2_cache` | bytes |
    ///
    /// Empty items are skipped; an unknown key or an unusable value is an error, and then nothing has changed.
    ///
    /// # Errors
    /// [`Error::BadOption`] names the key.
    pub fn apply_config(&mut self, config: &str) -> Result<()> {
        let mut new = self.clone();
        for item in config.split(';').map(str::trim).filter(|i| !i.is_empty()) {
            let (key, value) = item.split_once('=').ok_or_else(|| bad(item, "has no value"))?;
            let (key, value) = (key.trim(), value.trim());
            match key {
                "direct" => new.direct = boolean(key, value)?,
                "discard" => new.discard = boolean(key, value)?,
                "punch_junk" => new.punch_junk = boolean(key, value)?,
                "read_only" => new.read_only = boolean(key, value)?,
                "runtime_asserts" => new.runtime_asserts = boolean(key, value)?,
                "check_on_connect" => new.check_on_connect = boolean(key, value)?,
                "keep_erased" => new.keep_erased = sectors(key, value)?,
                "compact_after_unmaps" => {
                    new.compact_after_unmaps = Some(sectors(key, value)?).filter(|&n| n > 0);
                }
                "settle_ms" => new.settle_time = Duration::from_millis(number(key, value)?),
                "flush_ms" => new.flush_after = Duration::from_millis(number(key, value)?),
                "rate_limit" => new.rate_limit = Some(number(key, value)?).filter(|&n| n > 0),
                "l2_cache" => new.l2_cache_size = number(key, value)?,
                "id" => new.id = value.to_owned(),
                _ => return Err(bad(key, "is unknown")),
            }
        }
        *self = new;
        Ok(())
    }
}

fn bad(name: &str, reason: &str) -> Error {
    Error::BadOption { name: name.to_owned(), reason: reason.to_owned() }
}

fn boolean(key: &str, value: &str) -> Result<bool> {
    match value {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(bad(key, "is neither true nor false")),
    }
}

fn number(key: &str, value: &str) -> Result<u64> {
    value.parse().map_err(|_| bad(key, "is not a number"))
}

fn sectors(key: &str, value: &str) -> Result<u64> {
    number(key, value)?.checked_mul(CONFIG_SECTOR).ok_or_else(|| bad(key, "is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_origins_string_is_accepted_with_sizes_in_sectors() {
        let mut o = Options::default();
        o.apply_config("discard=true;compact_after_unmaps=262144;keep_erased=262144;runtime_asserts=false;id=disk0;")
            .unwrap();
        assert_eq!((o.keep_erased, o.compact_after_unmaps), (128 << 20, Some(128 << 20)));
        assert_eq!(o.id, "disk0");
        o.apply_config("compact_after_unmaps=0").unwrap();
        assert_eq!(o.compact_after_unmaps, None);
    }

    #[test]
    fn a_bad_item_is_named_and_nothing_changes() {
        for (config, name) in [
            ("read_only=true;keep_erased=x", "keep_erased"),
            ("read_only=true;nonsense=1", "nonsense"),
            ("read_only=true;discard", "discard"),
            ("read_only=true;discard=maybe", "discard"),
            ("read_only=true;keep_erased=18446744073709551615", "keep_erased"),
        ] {
            let mut o = Options::default();
            let e = o.apply_config(config).unwrap_err();
            assert_eq!(e.field(), Some(name), "{config}: {e}");
            assert!(!o.read_only, "{config}");
        }
    }
}
