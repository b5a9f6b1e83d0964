//! Refcount entries of 1 to 64 bits (section "Refcount blocks" of the qcow2 specification).
//!
//! Entries narrower than a byte are packed from the least significant bit on; wider ones are big-endian.

/// Bits 9 to 63 of a refcount table entry: the offset of the refcount block. The rest is reserved.
pub const TABLE_OFFSET: u64 = !0x1ff;

/// The refcount at `index` of the block `bytes`, whose entries are `1 << order` bits wide. Zero past the block's end.
#[must_use]
pub fn get(bytes: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let per_byte = 8usize >> order;
        let byte = bytes.get(index / per_byte).copied().unwrap_or(0);
        let shift = (index % per_byte) << order;
        return u64::from(byte >> shift) & ((1 << (1 << order)) - 1);
    }
    let width = 1usize << (order - 3);
    let Some(entry) = bytes.get(index * width..(index + 1) * width) else { return 0 };
    entry.iter().fold(0, |value, &b| value << 8 | u64::from(b))
}

/// Stores a refcount; `value` must fit the width. Returns the range of bytes that changed.
pub fn set(bytes: &mut [u8], order: u32, index: usize, value: u64) -> std::ops::Range<usize> {
    if order < 3 {
        let per_byte = 8usize >> order;
        let mask = (1u8 << (1 << order)) - 1;
        let shift = (index % per_byte) << order;
        let at = index / per_byte;
        if let Some(byte) = bytes.get_mut(at) {
            *byte = *byte & !(mask << shift) | (value as u8 & mask) << shift;
        }
        return at..at + 1;
    }
    let width = 1usize << (order - 3);
    let range = index * width..(index + 1) * width;
    if let Some(entry) = bytes.get_mut(range.clone()) {
        entry.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
    range
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn layouts_are_the_specifications() {
        let mut b = [0u8; 8];
        set(&mut b, 0, 9, 1);
        assert_eq!(b[1], 0b10);
        set(&mut b, 1, 1, 3);
        assert_eq!(b[0], 0b1100);
        set(&mut b, 2, 7, 0xa);
        assert_eq!(b[3], 0xa0);
        set(&mut b, 4, 2, 0x1234);
        assert_eq!(b[4..6], [0x12, 0x34]);
        assert_eq!(get(&b, 4, 2), 0x1234);
        assert_eq!(get(&b, 4, 4), 0);
    }

    proptest! {
        #[test]
        fn what_is_set_is_got_and_neighbours_stay(order in 0u32..=6, index in 0usize..60, value: u64, fill: u8) {
            let mut bytes = [fill; 512];
            let before: Vec<u64> = (0..64).map(|i| get(&bytes, order, i)).collect();
            let value = value & (u64::MAX >> (64 - (1u32 << order)));
            set(&mut bytes, order, index, value);
            for (i, old) in before.into_iter().enumerate() {
                prop_assert_eq!(get(&bytes, order, i), if i == index { value } else { old });
            }
        }
    }
}
