# Says what is installed, as lines `runtime version`; run inside the made image, and kept in its label.
python3 -c 'import sys; print("python", "%d.%d.%d" % sys.version_info[:3])'
node --version | sed 's/^v/nodejs /'
java -version 2>&1 | sed -n 's/.*version "\([0-9.]*\).*/java \1/p'
go version | sed 's/.* go\([0-9.]*\) .*/golang \1/'
ruby -e 'puts "ruby " + RUBY_VERSION'
