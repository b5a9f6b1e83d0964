//! Encryption of guest data, without I/O: sectors in and out of a cipher, and keys out of a LUKS header.

pub(crate) mod cipher;
pub(crate) mod keys;
