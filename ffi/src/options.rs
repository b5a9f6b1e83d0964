//! Options
//!
//! How an image is opened and how its recycler behaves. Get the defaults with qcr_options_init(), then change
//! members or apply a configuration string. The struct is plain data: opening copies it.

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qcow_recycler::{BackingFormat, BackingPolicy, DataFilePolicy, LogLevel, Logger, Options, Passphrase};

use crate::abi::{self, Out, Shared, copy_in};
use crate::boundary::call;
use crate::callbacks::{DESTROY_END, UserData};
use crate::error::{Fault, qcr_error};

/// Option flag: refuse every change; nothing is written to the image.
pub const QCR_READ_ONLY: u32 = 0x1;
/// Option flag: accept discards. Set by default; without it, qcr_discard() fails with -EOPNOTSUPP.
pub const QCR_DISCARD: u32 = 0x2;
/// Option flag: check the whole image when it is opened, and refuse it if it is corrupt.
pub const QCR_CHECK_ON_CONNECT: u32 = 0x4;
/// Option flag: check the library's own invariants while it works. Slow; for tests.
pub const QCR_RUNTIME_ASSERTS: u32 = 0x8;
/// Option flag: transfers pass the host's page cache (O_DIRECT), for qcr_open_path(), which fails with -EOPNOTSUPP
/// where the file system has no such transfers. Memory and requests may have any alignment; what the kernel does not
/// take as it is costs a copy, so page-aligned memory is best. Ignored on block callbacks.
pub const QCR_DIRECT: u32 = 0x10;
/// Option flag: give the space of clusters that were freed, and stay in the file, back to the host by punching holes,
/// where the file or the callbacks can do that. Set by default.
pub const QCR_PUNCH_JUNK: u32 = 0x20;

/// Backing file: an image that has one is refused with -EPERM. The default.
pub const QCR_BACKING_REFUSE: u32 = 0;
/// Backing file: not opened. A request that needs its contents fails, everything else works.
pub const QCR_BACKING_SKIP: u32 = 1;
/// Backing file: opened read-only, in the format that the image records (never guessed), and so are the backing
/// files of backing files. For images from a source you trust: the image names the files.
pub const QCR_BACKING_ALLOW: u32 = 2;

/// External data file (which holds the guest's data): an image that has one is refused with -EPERM. The default.
pub const QCR_DATA_FILE_REFUSE: u32 = 0;
/// External data file: not opened. Requests of guests fail, everything else works, compacting included.
pub const QCR_DATA_FILE_SKIP: u32 = 1;
/// External data file: opened, for writing too unless QCR_READ_ONLY is set, and locked as the image is. For images from
/// a source you trust: the image names the file.
pub const QCR_DATA_FILE_ALLOW: u32 = 2;

/// Format of a backing file: none is assumed; where an image records none, it is refused. The default.
pub const QCR_FORMAT_RECORDED: u32 = 0;
/// Format of a backing file: the bytes of the disk, one after another.
pub const QCR_FORMAT_RAW: u32 = 1;
/// Format of a backing file: another image.
pub const QCR_FORMAT_QCOW2: u32 = 2;

/// How to open an image. Sizes are in bytes, times in milliseconds.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_options {
    /// sizeof(struct qcr_options), set by the caller.
    pub struct_size: u32,
    /// QCR_READ_ONLY, QCR_DISCARD, QCR_CHECK_ON_CONNECT, QCR_RUNTIME_ASSERTS, QCR_DIRECT, QCR_PUNCH_JUNK.
    pub flags: u32,
    /// Bytes of zeroed clusters that the recycler keeps ready for new guest writes.
    pub keep_erased: u64,
    /// The recycler compacts on its own when more bytes than this are free inside the file; 0: only when asked.
    pub compact_after_unmaps: u64,
    /// How long the amount of free space must not have grown before it does. If it grows all the time, it does after twelve times
    /// as long.
    pub settle_ms: u64,
    /// The recycler flushes this long after the first unflushed work, unless the guest flushes first.
    pub flush_ms: u64,
    /// The most bytes a second that the recycler copies and erases; 0: no limit.
    pub rate_limit: u64,
    /// Memory for cached L2 tables.
    pub l2_cache_size: u64,
    /// QCR_BACKING_REFUSE, QCR_BACKING_SKIP or QCR_BACKING_ALLOW.
    pub backing: u32,
    /// Format of backing files whose images do not record one: QCR_FORMAT_RECORDED, QCR_FORMAT_RAW or
    /// QCR_FORMAT_QCOW2.
    pub backing_format: u32,
    /// Where relative names of backing files and of the data file start. NULL: in the directory of the image's own
    /// path; an image on block callbacks has none, and must be given one if backing files are allowed.
    pub backing_directory: *const c_char,
    /// The image's name in statistics and messages, UTF-8.
    pub id: [c_char; 64],
    /// QCR_DATA_FILE_REFUSE, QCR_DATA_FILE_SKIP or QCR_DATA_FILE_ALLOW. Not asked by
    /// qcr_open_callbacks_with_data().
    pub data_file: u32,
    /// 0.
    pub reserved: u32,
    /// The passphrase of an encrypted image, and of encrypted images behind it: `passphrase_length` bytes, any bytes. NULL: none;
    /// an encrypted image can then be looked at, checked, discarded from and made shorter, and neither read nor written. Opening
    /// copies it, and has wiped the copy when it returns. With QEMU's first encryption (AES) nothing tells whether it is right.
    pub passphrase: *const c_void,
    /// Length of the passphrase in bytes, 0 if it is NULL.
    pub passphrase_length: u64,
}

// SAFETY: integers, and pointers that may be NULL; no padding.
unsafe impl Shared for qcr_options {
    const NAME: &'static str = "options";
    const MIN_SIZE: usize = std::mem::offset_of!(qcr_options, data_file);
}

/// The longest passphrase that is taken, in bytes.
const MAX_PASSPHRASE: u64 = 1 << 20;

/// How serious a message is: something failed.
pub const QCR_LOG_ERROR: u32 = 1;
/// How serious a message is: something unexpected that the library handled.
pub const QCR_LOG_WARNING: u32 = 2;
/// How serious a message is: a milestone of the recycler's work.
pub const QCR_LOG_INFO: u32 = 3;
/// How serious a message is: a step of it.
pub const QCR_LOG_DEBUG: u32 = 4;

/// Takes a message. It is called from any thread, also from several at once, and may call of the library what block
/// callbacks may. It must return by itself (no longjmp, no C++ exception).
///
/// `level` is one of QCR_LOG_ERROR to QCR_LOG_DEBUG; `message` is one line of UTF-8, valid during the call.
pub type qcr_log_fn = Option<unsafe extern "C" fn(user: *mut c_void, level: u32, message: *const c_char)>;

/// Where an image's messages go. Opening copies the struct, and the `destroy` rule of struct qcr_block_callbacks
/// holds.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_log {
    /// sizeof(struct qcr_log), set by the caller.
    pub struct_size: u32,
    /// The least serious level that is wanted; 0 stands for QCR_LOG_WARNING.
    pub level: u32,
    /// Passed to the functions below.
    pub user: *mut c_void,
    /// Called exactly once, when `user` is not used any more. May be NULL.
    pub destroy: Option<unsafe extern "C" fn(user: *mut c_void)>,
    /// Takes a message.
    pub log: qcr_log_fn,
}

// SAFETY: integers, and pointers that may be NULL; no padding.
unsafe impl Shared for qcr_log {
    const NAME: &'static str = "log";
}
const _: () = assert!(std::mem::offset_of!(qcr_log, log) == DESTROY_END);

/// Sets `options` to the defaults. Its struct_size must have been set (see QCR_INIT). Any thread.
///
/// Errors: -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_options_init(options: *mut qcr_options, error: *mut qcr_error) -> c_int {
    let body = || {
        // SAFETY: the header's rule for structs.
        let out = unsafe { Out::new(options)? };
        out.store(to_c(&Options::default(), qcr_options::zeroed())?);
        Ok(())
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

/// Applies a configuration string `key=value;key=value;...` to `options`, which must have been initialised. Any
/// thread.
///
/// | key                    | value |
/// |------------------------|-------|
/// | `direct`, `discard`, `punch_junk`, `read_only`, `check_on_connect`, `runtime_asserts` | `true`, `false`, `1` or `0` |
/// | `keep_erased`          | in sectors of 512 bytes (not in bytes) |
/// | `compact_after_unmaps` | in sectors of 512 bytes (not in bytes); 0: only when asked |
/// | `settle_ms`, `flush_ms`| milliseconds |
/// | `rate_limit`           | bytes a second; 0: no limit |
/// | `l2_cache`             | bytes |
/// | `id`                   | at most 63 bytes |
///
/// Empty items are skipped.
///
/// Errors: -EINVAL for an unknown key or an unusable value, named in `error->field`; `options` has not changed then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_options_parse(
    options: *mut qcr_options,
    config: *const c_char,
    error: *mut qcr_error,
) -> c_int {
    let body = || {
        // SAFETY: the header's rules for structs and strings.
        let (out, given, config) =
            unsafe { (Out::new(options)?, copy_in(options.cast_const())?, abi::text("config", config)?) };
        let mut parsed = to_core(&given)?;
        parsed.apply_config(config)?;
        out.store(to_c(&parsed, given)?);
        Ok(())
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

/// `base` with everything but the policies for other files and the passphrase taken from `options`: a configuration string cannot
/// set those.
fn to_c(options: &Options, base: qcr_options) -> Result<qcr_options, Fault> {
    let Options { id, .. } = options;
    let mut c = qcr_options {
        flags: [
            (options.read_only, QCR_READ_ONLY),
            (options.discard, QCR_DISCARD),
            (options.check_on_connect, QCR_CHECK_ON_CONNECT),
            (options.runtime_asserts, QCR_RUNTIME_ASSERTS),
            (options.direct, QCR_DIRECT),
            (options.punch_junk, QCR_PUNCH_JUNK),
        ]
        .into_iter()
        .fold(0, |flags, (set, flag)| if set { flags | flag } else { flags }),
        keep_erased: options.keep_erased,
        compact_after_unmaps: options.compact_after_unmaps.unwrap_or(0),
        settle_ms: milliseconds(options.settle_time),
        flush_ms: milliseconds(options.flush_after),
        rate_limit: options.rate_limit.unwrap_or(0),
        l2_cache_size: options.l2_cache_size,
        ..base
    };
    if id.len() >= c.id.len() {
        return Err(Fault::argument("id", format!("is longer than {} bytes", c.id.len() - 1)));
    }
    abi::store_text(&mut c.id, id);
    Ok(c)
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// All but the policies for other files, the passphrase and the logger.
fn to_core(c: &qcr_options) -> Result<Options, Fault> {
    let known = QCR_READ_ONLY | QCR_DISCARD | QCR_CHECK_ON_CONNECT | QCR_RUNTIME_ASSERTS | QCR_DIRECT | QCR_PUNCH_JUNK;
    abi::known_flags(c.flags, known)?;
    unrecorded(c.backing_format)?;
    if c.reserved != 0 {
        return Err(Fault::argument("reserved", format!("is {}, not 0", c.reserved)));
    }
    let id = c.id.map(|byte| u8::from_ne_bytes(byte.to_ne_bytes()));
    let id = CStr::from_bytes_until_nul(&id).map_err(|_| Fault::argument("id", "has no closing zero byte"))?;
    Ok(Options {
        read_only: c.flags & QCR_READ_ONLY != 0,
        discard: c.flags & QCR_DISCARD != 0,
        check_on_connect: c.flags & QCR_CHECK_ON_CONNECT != 0,
        runtime_asserts: c.flags & QCR_RUNTIME_ASSERTS != 0,
        direct: c.flags & QCR_DIRECT != 0,
        punch_junk: c.flags & QCR_PUNCH_JUNK != 0,
        keep_erased: c.keep_erased,
        compact_after_unmaps: Some(c.compact_after_unmaps).filter(|&n| n > 0),
        settle_time: Duration::from_millis(c.settle_ms),
        flush_after: Duration::from_millis(c.flush_ms),
        rate_limit: Some(c.rate_limit).filter(|&n| n > 0),
        l2_cache_size: c.l2_cache_size,
        id: id.to_str().map_err(|_| Fault::argument("id", "is not UTF-8"))?.to_owned(),
        ..Options::default()
    })
}

/// The options of an image to be opened, with defaults for NULL. `path` is the image's own, if it has one.
///
/// # Safety
/// The header's rules for structs and strings.
pub(crate) unsafe fn options_for_open(
    options: *const qcr_options,
    path: Option<&Path>,
    log: Option<Log>,
) -> Result<Options, Fault> {
    let mut opened = Options::default();
    if !options.is_null() {
        // SAFETY: as promised by the caller.
        let c = unsafe { copy_in(options)? };
        opened = to_core(&c)?;
        opened.backing = match c.backing {
            QCR_BACKING_REFUSE => BackingPolicy::Refuse,
            QCR_BACKING_SKIP => BackingPolicy::Skip,
            QCR_BACKING_ALLOW => BackingPolicy::Allow {
                // SAFETY: as promised by the caller.
                directory: unsafe { directory(c.backing_directory, path)? },
                unrecorded: unrecorded(c.backing_format)?,
            },
            other => return Err(Fault::argument("backing", format!("{other} is unknown"))),
        };
        opened.data_file = match c.data_file {
            QCR_DATA_FILE_REFUSE => DataFilePolicy::Refuse,
            QCR_DATA_FILE_SKIP => DataFilePolicy::Skip,
            QCR_DATA_FILE_ALLOW => {
                // SAFETY: as promised by the caller.
                DataFilePolicy::Allow { directory: unsafe { directory(c.backing_directory, path)? } }
            }
            other => return Err(Fault::argument("data_file", format!("{other} is unknown"))),
        };
        // SAFETY: as promised by the caller.
        opened.passphrase = unsafe { passphrase(&c)? };
    }
    if let Some(log) = log {
        opened.logger = log.into_logger();
    }
    Ok(opened)
}

/// # Safety
/// So many bytes are readable there as the options say.
unsafe fn passphrase(c: &qcr_options) -> Result<Option<Passphrase>, Fault> {
    if c.passphrase_length > MAX_PASSPHRASE {
        return Err(Fault::argument("passphrase_length", format!("is more than {MAX_PASSPHRASE}")));
    }
    if c.passphrase.is_null() {
        let none = c.passphrase_length == 0;
        return if none { Ok(None) } else { Err(Fault::null("passphrase")) };
    }
    // SAFETY: as promised by the caller; the length was checked.
    let bytes = unsafe { std::slice::from_raw_parts(c.passphrase.cast::<u8>(), c.passphrase_length as usize) };
    Ok(Some(Passphrase::new(bytes)))
}

fn unrecorded(format: u32) -> Result<Option<BackingFormat>, Fault> {
    match format {
        QCR_FORMAT_RECORDED => Ok(None),
        QCR_FORMAT_RAW => Ok(Some(BackingFormat::Raw)),
        QCR_FORMAT_QCOW2 => Ok(Some(BackingFormat::Qcow2)),
        other => Err(Fault::argument("backing_format", format!("{other} is unknown"))),
    }
}

/// # Safety
/// `given` keeps the header's rule for strings.
unsafe fn directory(given: *const c_char, image: Option<&Path>) -> Result<PathBuf, Fault> {
    if !given.is_null() {
        // SAFETY: the header's rule for strings.
        return Ok(path_of(unsafe { abi::string("backing_directory", given)? }));
    }
    image
        .and_then(Path::parent)
        .map(Path::to_owned)
        .ok_or_else(|| Fault::argument("backing_directory", "is NULL, and the image has no path of its own"))
}

/// A path argument: any bytes.
pub(crate) fn path_of(text: &CStr) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(text.to_bytes()))
}

/// A log callback that the library has taken over.
pub(crate) struct Log {
    owner: UserData,
    level: u32,
    log: unsafe extern "C" fn(*mut c_void, u32, *const c_char),
}

impl Log {
    /// Takes a log callback over; NULL is none. From here on its `destroy` runs exactly once, however this ends.
    ///
    /// # Safety
    /// The header's rules for structs and callbacks.
    pub(crate) unsafe fn adopt(log: *const qcr_log) -> Result<Option<Self>, Fault> {
        if log.is_null() {
            return Ok(None);
        }
        // SAFETY: as promised by the caller.
        let (owner, c) = unsafe { (UserData::adopt(log)?, copy_in(log)) };
        let c = c?;
        let level = match c.level {
            0 => QCR_LOG_WARNING,
            known @ QCR_LOG_ERROR..=QCR_LOG_DEBUG => known,
            other => return Err(Fault::argument("level", format!("{other} is unknown"))),
        };
        let log = c.log.ok_or_else(|| Fault::null("log"))?;
        Ok(Some(Log { owner, level, log }))
    }

    fn into_logger(self) -> Logger {
        Logger::new(move |level, message| {
            // All of `self`, lest the closure take its parts without the owner.
            let Log { owner, level: wanted, log } = &self;
            let level = match level {
                LogLevel::Error => QCR_LOG_ERROR,
                LogLevel::Warning => QCR_LOG_WARNING,
                LogLevel::Info => QCR_LOG_INFO,
                LogLevel::Debug => QCR_LOG_DEBUG,
            };
            if level > *wanted {
                return;
            }
            let mut line = Vec::with_capacity(message.len() + 1);
            line.extend(message.bytes().map(|byte| if byte == 0 { b'?' } else { byte }));
            line.push(0);
            // SAFETY: the header's rules for callbacks; `line` ends with its only zero byte.
            unsafe { log(owner.user(), level, line.as_ptr().cast()) };
        })
    }
}
