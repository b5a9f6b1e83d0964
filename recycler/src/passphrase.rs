//! The passphrase of an encrypted image: never printed, and wiped when nobody holds it any more.

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

/// A passphrase, any bytes. Clones share the memory, which is wiped when the last of them is dropped.
#[derive(Clone)]
pub struct Passphrase(Arc<Zeroizing<Vec<u8>>>);

impl Passphrase {
    /// Takes the bytes over; where they are copied from, the copy alone is wiped later.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Passphrase(Arc::new(Zeroizing::new(bytes.into())))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(..)")
    }
}

#[cfg(test)]
mod tests {
    use crate::options::Options;

    use super::*;

    #[test]
    fn it_is_not_printed_with_the_options() {
        let options = Options { passphrase: Some(Passphrase::new("open sesame")), ..Options::default() };
        let text = format!("{options:?}");
        assert!(text.contains("Passphrase(..)") && !text.contains("sesame"), "{text}");
        assert!(!text.contains(&format!("{:?}", b"open sesame")), "{text}");
    }
}
