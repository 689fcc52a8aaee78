# Generates clients from the service's description, and has each of them create, read, replace, list
# and delete an item. $1: the program. $2: a folder for everything, which the caller removes. $3: the
# folder of this script.
set -eu
program=$1 folder=$2 here=$3
cd "$folder"
export HOME="$folder" npm_config_cache="$folder/npm-cache" PIP_DISABLE_PIP_VERSION_CHECK=1

"$program" serve --listen 127.0.0.1:0 --database sqlite::memory: >log 2>&1 &
service=$!
trap 'kill $service 2>/dev/null || true' EXIT
tries=0
until url=$(sed -n 's/.*listening on \(http:[^ ]*\).*/\1/p' log | head -1) && test -n "$url"; do
  tries=$((tries + 1))
  test $tries -lt 100 || { cat log; exit 1; }
  sleep 0.1
done
curl -sSf "$url/openapi.json" -o openapi.json

echo "== redocly and spectral"
npm install --silent --no-audit --no-fund \
  @redocly/cli@2 @stoplight/spectral-cli@6 openapi-typescript@7 openapi-fetch@0.14 typescript@5
npx redocly lint openapi.json
echo 'extends: ["spectral:oas"]' >.spectral.yaml
npx spectral lint --fail-severity error openapi.json

echo "== openapi-typescript and openapi-fetch"
npx openapi-typescript openapi.json -o api.d.ts
cp "$here/client.mts" .
npx tsc --strict --skipLibCheck --module nodenext --target es2022 --lib es2022,dom client.mts
node client.mjs "$url"

echo "== openapi-python-client"
python3 -m venv python
python/bin/pip -q install openapi-python-client==0.29.1
PATH="$folder/python/bin:$PATH" openapi-python-client generate --path openapi.json --output-path generated
python/bin/pip -q install ./generated
python/bin/python "$here/client.py" "$url"
