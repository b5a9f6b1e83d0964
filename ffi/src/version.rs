//! Version
//!
//! The macros say what a program was compiled with, the functions what it runs with. Programs that were linked with
//! libqcowrecycle.so.0 run with every later libqcowrecycle.so.0.

use std::ffi::c_char;

/// Changes when programs must be recompiled.
pub const QCR_VERSION_MAJOR: u32 = 0;
/// Changes when functions or struct members are added.
pub const QCR_VERSION_MINOR: u32 = 1;
/// Changes with every other release.
pub const QCR_VERSION_PATCH: u32 = 0;

/// The version of the library that is running: major << 16 | minor << 8 | patch. Any thread; cannot fail.
#[unsafe(no_mangle)]
pub extern "C" fn qcr_version() -> u32 {
    QCR_VERSION_MAJOR << 16 | QCR_VERSION_MINOR << 8 | QCR_VERSION_PATCH
}

/// The same as text, such as "0.1.0". The string is static: do not free it. Any thread; cannot fail.
#[unsafe(no_mangle)]
pub extern "C" fn qcr_version_string() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_macros_are_the_packages_version() {
        let version = format!("{QCR_VERSION_MAJOR}.{QCR_VERSION_MINOR}.{QCR_VERSION_PATCH}");
        assert_eq!(version, env!("CARGO_PKG_VERSION"));
    }
}
