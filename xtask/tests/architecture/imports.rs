//! Which file of a crate imports from which: every path that begins with `crate`, `super`, `self` or a module of the file,
//! followed through the re-exports of the file it leads to.
//!
//! A simple reader of Rust: it knows comments, literals, `use` trees and the modules at the end of a file that are only
//! there for its tests, which do not count.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;

/// The path of a module within its crate; the crate's root is the empty one.
type Module = Vec<String>;

/// The words between the `::` of a path.
type Words = Vec<String>;
/// All files of a crate.
type Files = BTreeMap<Module, File>;

/// One file.
#[derive(Debug)]
pub(crate) struct File {
    /// As it is shown: its path below `src`.
    name: String,
    /// What its `use`s name: the name in this file, and the path.
    named: Vec<(String, Words)>,
    /// All its paths, those of its `use`s included.
    paths: Vec<Words>,
}

/// Every file below a crate's `src`.
pub(crate) fn files(source: &Path) -> Files {
    let mut files = BTreeMap::new();
    let mut folders = vec![source.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let name = path.strip_prefix(source).unwrap().display().to_string();
                let text = std::fs::read_to_string(&path).unwrap();
                add(&mut files, &name, &text);
            }
        }
    }
    files
}

fn add(files: &mut Files, name: &str, text: &str) {
    let path = name.strip_suffix(".rs").unwrap();
    let mut module: Module = path.split('/').map(str::to_owned).collect();
    let last = module.last().map(String::as_str);
    if last == Some("mod") || (module.len() == 1 && matches!(last, Some("lib" | "main"))) {
        module.pop();
    }
    let (named, paths) = paths(&without_tests(tokens(text)));
    let file = File {
        name: name.to_owned(),
        named,
        paths,
    };
    files.insert(module, file);
}

/// The words and signs of a source text, `::` as one; without comments and without the contents of literals.
fn tokens(text: &str) -> Vec<String> {
    let letters: Vec<char> = text.chars().collect();
    let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
    let at = |index: usize| letters.get(index).copied().unwrap_or('\0');
    let mut tokens = Vec::new();
    let mut here = 0;
    while here < letters.len() {
        let letter = letters[here];
        let begin = here;
        if letter == '/' && at(here + 1) == '/' {
            while here < letters.len() && letters[here] != '\n' {
                here += 1;
            }
        } else if letter == '/' && at(here + 1) == '*' {
            here += 2;
            while here < letters.len() && !(letters[here] == '*' && at(here + 1) == '/') {
                here += 1;
            }
            here += 2;
        } else if letter == '"' {
            here += 1;
            while here < letters.len() && letters[here] != '"' {
                here += if letters[here] == '\\' { 2 } else { 1 };
            }
            here += 1;
        } else if letter == 'r' && raw_string(&letters[here..]).is_some() {
            here += raw_string(&letters[here..]).unwrap();
        } else if letter == '\'' && (at(here + 1) == '\\' || at(here + 2) == '\'') {
            here += 2;
            while here < letters.len() && letters[here] != '\'' {
                here += 1;
            }
            here += 1;
        } else if is_word(letter) {
            while is_word(at(here)) {
                here += 1;
            }
            tokens.push(letters[begin..here].iter().collect());
        } else if letter == ':' && at(here + 1) == ':' {
            here += 2;
            tokens.push("::".to_owned());
        } else {
            here += 1;
            if !letter.is_whitespace() {
                tokens.push(letter.to_string());
            }
        }
    }
    tokens
}

/// The length of the raw string that begins here, if one does.
fn raw_string(letters: &[char]) -> Option<usize> {
    let hashes = letters[1..]
        .iter()
        .take_while(|letter| **letter == '#')
        .count();
    if letters.get(1 + hashes) != Some(&'"') {
        return None;
    }
    let end: Vec<char> = std::iter::once('"')
        .chain(std::iter::repeat_n('#', hashes))
        .collect();
    let begin = 2 + hashes;
    let length = letters[begin..]
        .windows(end.len())
        .position(|window| window == end)?;
    Some(begin + length + end.len())
}

/// Cuts off the module of tests, which is the last thing in a file.
fn without_tests(mut tokens: Vec<String>) -> Vec<String> {
    const BEGIN: [&str; 8] = ["#", "[", "cfg", "(", "test", ")", "]", "mod"];
    if let Some(begin) = tokens
        .windows(BEGIN.len())
        .position(|window| window == BEGIN)
    {
        tokens.truncate(begin);
    }
    tokens
}

/// The paths that a `use` names, each with the name that it has in the file: `a::{b, c as d}` is `a::b` named `b` and `a::c`
/// named `d`. Returns the rest of the tokens, too.
fn tree<'a>(
    mut tokens: &'a [String],
    before: &[String],
    named: &mut Vec<(String, Words)>,
) -> &'a [String] {
    let mut path = before.to_vec();
    loop {
        let Some((token, rest)) = tokens.split_first() else {
            return tokens;
        };
        match token.as_str() {
            "{" => {
                tokens = rest;
                while tokens.first().is_some_and(|token| token != "}") {
                    tokens = tree(tokens, &path, named);
                    if tokens.first().is_some_and(|token| token == ",") {
                        tokens = &tokens[1..];
                    }
                }
                return tokens.get(1..).unwrap_or_default();
            }
            "as" => {
                let name = rest.first().cloned().unwrap_or_default();
                named.push((name, path));
                return rest.get(1..).unwrap_or_default();
            }
            "," | "}" | ";" => {
                if path.last().is_some_and(|last| last == "self") && path.len() > 1 {
                    path.pop();
                }
                named.push((path.last().cloned().unwrap_or_default(), path));
                return tokens;
            }
            "::" => tokens = rest,
            word => {
                path.push(word.to_owned());
                tokens = rest;
            }
        }
    }
}

/// What the `use`s of a file name, and all its paths.
fn paths(mut tokens: &[String]) -> (Vec<(String, Words)>, Vec<Words>) {
    let (mut named, mut paths) = (Vec::new(), Vec::new());
    while let Some((token, rest)) = tokens.split_first() {
        if token == "use" && rest.first().is_some_and(|next| next != "<") {
            tokens = tree(rest, &[], &mut named);
        } else if rest.first().is_some_and(|next| next == "::") {
            let mut path = vec![token.clone()];
            tokens = rest;
            while let [colons, word, rest @ ..] = tokens
                && colons == "::"
                && word.starts_with(|letter: char| letter.is_alphabetic() || letter == '_')
            {
                path.push(word.clone());
                tokens = rest;
            }
            if path.len() == 1 {
                tokens = &tokens[1..];
            }
            paths.push(path);
        } else {
            tokens = rest;
        }
    }
    paths.extend(named.iter().map(|(_, path)| path.clone()));
    (named, paths)
}

/// The whole path from the crate's root, of one that begins in `module`; `None` when it leads to another crate.
fn absolute(path: &[String], module: &Module, files: &Files) -> Option<Vec<String>> {
    let (first, rest) = path.split_first()?;
    let mut base = module.clone();
    let mut rest = rest;
    match first.as_str() {
        "crate" => base.clear(),
        "self" => {}
        "super" => {
            base.pop();
            while rest.first().is_some_and(|word| word == "super") {
                base.pop();
                rest = &rest[1..];
            }
        }
        child => {
            base.push(child.to_owned());
            if !files.contains_key(&base) {
                return None;
            }
        }
    }
    base.extend(rest.iter().cloned());
    Some(base)
}

/// The file that holds what a whole path names, where so many files may pass it on.
fn target(path: &[String], files: &Files, passes: usize) -> Option<Module> {
    let known = |length: &usize| files.contains_key(&path[..*length]);
    let length = (0..=path.len()).rev().find(known)?;
    let (module, rest) = path.split_at(length);
    let module = module.to_vec();
    if let (Some((name, rest)), true) = (rest.split_first(), passes > 0)
        && let Some((_, path)) = files[&module].named.iter().find(|(known, _)| known == name)
    {
        let mut whole = absolute(path, &module, files)?;
        whole.extend(rest.iter().cloned());
        return target(&whole, files, passes - 1);
    }
    Some(module)
}

/// One shortest circle for each set of files that need each other.
pub(crate) fn circles(files: &Files) -> Vec<Vec<String>> {
    let needs = files.iter().map(|(module, file)| {
        let whole = file
            .paths
            .iter()
            .filter_map(|path| absolute(path, module, files));
        let mut needs: BTreeSet<Module> =
            whole.filter_map(|path| target(&path, files, 9)).collect();
        needs.remove(module);
        (module, needs)
    });
    let needs: BTreeMap<&Module, BTreeSet<Module>> = needs.collect();
    let mut told: BTreeSet<Module> = BTreeSet::new();
    let mut circles = Vec::new();
    for start in files.keys() {
        if told.contains(start) {
            continue;
        }
        if let Some(circle) = shortest(start, &needs) {
            circles.push(
                circle
                    .iter()
                    .chain([start])
                    .map(|module| files[module].name.clone())
                    .collect(),
            );
            told.extend(circle);
        }
    }
    circles
}

/// The shortest way from a file back to itself, without its end.
fn shortest(start: &Module, needs: &BTreeMap<&Module, BTreeSet<Module>>) -> Option<Vec<Module>> {
    let mut before: BTreeMap<&Module, &Module> = BTreeMap::new();
    let mut ahead = VecDeque::from([start]);
    while let Some(module) = ahead.pop_front() {
        for next in &needs[module] {
            if next == start {
                let mut way = vec![module.clone()];
                let mut last = module;
                while last != start {
                    last = before[last];
                    way.push(last.clone());
                }
                way.reverse();
                return Some(way);
            }
            if !before.contains_key(next) {
                before.insert(next, module);
                ahead.push_back(next);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(sources: &[(&str, &str)]) -> Vec<Vec<String>> {
        let mut files = BTreeMap::new();
        for (name, text) in sources {
            add(&mut files, name, text);
        }
        circles(&files)
    }

    #[test]
    fn files_that_need_each_other_are_found_however_they_name_each_other() {
        let lib = ("lib.rs", "mod a; mod b;");
        for (a, b) in [
            ("use crate::b::B;", "use crate::a::A;"),
            (
                "use crate::{c::{C, D}, b::{self, B as X}};",
                "use super::a;",
            ),
            (
                "fn f() -> crate::b::B { todo() }",
                "fn g() { super::a::f(); }",
            ),
        ] {
            let circle = found(&[lib, ("a.rs", a), ("b.rs", b)]);
            assert_eq!(circle, [["a.rs", "b.rs", "a.rs"]], "{a} {b}");
            assert_eq!(
                found(&[lib, ("a.rs", a), ("b.rs", "use std::a;")]),
                [[""; 0]; 0]
            );
        }
        // A folder and what is in it, and a longer way.
        let circle = found(&[
            ("x/mod.rs", "mod y; mod z; pub use y::Y; fn own() {}"),
            ("x/y.rs", "use super::own;"),
            ("x/z.rs", ""),
            ("a.rs", "use crate::b::B;"),
            ("b.rs", "use crate::c::C;"),
            ("c.rs", "use crate::a::A;"),
        ]);
        let expected = [
            &["a.rs", "b.rs", "c.rs", "a.rs"][..],
            &["x/mod.rs", "x/y.rs", "x/mod.rs"],
        ];
        assert_eq!(circle, expected);
    }

    #[test]
    fn what_is_only_passed_on_said_or_tested_is_no_need() {
        let quiet = found(&[
            ("lib.rs", "mod a; mod b; mod x; pub use a::A; pub use x::Z;"),
            // Passed on by the crate's root.
            ("b.rs", "use crate::A; use crate::Z;"),
            (
                "a.rs",
                "// use crate::b::B;\n/* use crate::b; */ const S: &str = \"use crate::b\"; const R: &str = r#\"\"crate::b\"#; \
                      const Q: char = '\"'; #[cfg(test)] mod tests { use crate::b::B; }",
            ),
            // Passed on by the folder.
            (
                "x/mod.rs",
                "mod y; mod z; pub use self::{y::Y, z::*}; pub use z::Z;",
            ),
            ("x/y.rs", "use super::Z;"),
            ("x/z.rs", "fn f<'a>(x: &'a str) {}"),
        ]);
        assert_eq!(quiet, [[""; 0]; 0]);
    }
}
