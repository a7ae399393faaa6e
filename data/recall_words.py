"""Words of generated records (`recall.py`).

There are many nouns, so that a model also recalls lines with words that no record has. A model that
was trained with 43 of them failed in a test with other words.
"""

NOUNS = """
account acre address advice age agent air airport alarm album amount angle animal answer apple
apron area arm army arrow art article ash atlas atom attic aunt author autumn avenue award axis
axle baby back badge bag baker balance ball balloon bamboo banana band bank bar barn barrel base
basin basket bat bath battery bay beach bead beam bean bear beard beast bed bee beer bell belt
bench bend berry bird birth bishop block blood board boat body bolt bomb bone book boot border
boss bottle bottom bowl box boy brain branch brass bread breath brick bridge broker brother brush
bucket budget bug builder building bulb bull bullet bus bush butter button buyer cabin cabinet
cable cage cake camel camera camp canal candle cap cape captain car card cargo carpet carriage
cart case castle cat cattle cause cave cell cellar cent center century chain chair chalk chamber
chance change channel chapel chapter charge chart cheek cheese chef chest chicken chief child chin
choice church circle citizen city claim class clause clay clerk client cliff climate clock cloth
cloud club coach coal coast coat code coffee coin collar college color column comb comet committee
company compass concert cook copper corn corner cost cottage cotton couch council count country
county couple course court cousin cover cow crane cream creek crew crime crop cross crowd crown
cube cup curtain curve customer cycle dam dance danger date daughter dawn day dealer death debt
deck deer degree delay demand dentist depth desert desk device diary dinner dirt disease dish
ditch doctor dog dollar door dot doubt dozen dragon drama drawer dream dress drill drink driver
drop drum duck dust duty eagle ear earth east echo edge editor effect effort egg elbow element
emperor empire end enemy energy engine engineer error estate evening event exam example exit
expert export eye face fact factor factory failure fair faith fall family fan farm farmer fashion
father fault fear feast feather feature fee fellow fence ferry fever fiber field fight figure file
film filter finger fire fish fist flag flame flat flavor fleet flight flood floor flour flower
fluid fly fog fold folder folk food foot force forest fork form fort fountain fox frame friend
frog front frost fruit fuel function fund fur future gallery game garage garden garlic gas gate
gear gem general gentleman ghost giant gift girl glass globe glove goal goat gold goose governor
grade grain grape graph grass grave gravel ground group grove guard guess guest guide guitar gulf
gun habit hair half hall hammer hand handle harbor harvest hat hawk head heart heat heaven heel
height helmet help hen herb hero hill hinge history hole holiday home honey honor hook hope
horn horse hospital host hotel hour house human hunter hut ice id idea image impact inch income
index infant injury ink inn insect inside island issue item ivory jacket jail jar jaw jet jewel
job joint joke journal journey joy judge juice jump junction jungle jury justice kettle key kidney
king kingdom kiss kitchen kite knee knife knight knock knot label labor lace ladder lady lake lamb
lamp land landlord language lantern lap law lawn lawyer layer lead leader leaf league leather
lecture leg lemon length lesson letter lever library lid life lift light limb limit lion lip
liquid liver load loan lobby lock locker log loop lord loss lot love luck lumber lunch lung
machine magnet maid mail major maker mall man manager map marble march margin mark market marriage
mask mass master match mate matter meadow meal measure meat medal member memory menu merchant
mercy metal meter method middle midnight mile milk mill mind mine minister minute mirror model
moment money monkey month mood moon morning mother motion motor mountain mouse mouth movie mud
muscle museum music nail name nation nature neck needle neighbor nerve nest net network news night
node noise noon north nose note notice novel number nurse nut oak object ocean offer office
officer oil onion opera option orange orchard order organ origin outcome output oven owl owner ox
pack package page paint pair palace palm pan panel panic paper parade parcel parent park parrot
part partner party pass password path patient patrol pattern pause pea peace peak pearl pen pencil
people pepper period permit person phase phone photo phrase piano picture pie piece pig pigeon
pile pilot pine pipe pit pitch plain plan plane planet plant plate platform play player plot
pocket poem poet point poison police policy pond pool port portion post pot potato pound powder
power prayer present president press price pride priest prince print prison prize problem process
produce product profit program project promise proof property protest pump pupil purpose purse
quarter queen question queue quiet quilt rabbit race rack radar radio rail rain rank rat rate
ratio ray reading reason receipt recipe reference region relief rent repair report rescue resort
rest result return review reward rhythm rice rider ridge rifle right ring risk river road roast
robe robot rock rocket rod role roof room root rope rose route row rubber rug rule ruler run
saddle safety sail sailor saint salad sale salt sample sand satellite sauce scale scene school
science score scout screen screw sea season seat second secret section seed self seller senate
sense sensor sentence series servant service session set shade shadow shaft shape share shed sheep
sheet shelf shell shelter shepherd shield ship shirt shock shoe shop shore shot shoulder show
shower side sign signal silence silk silver singer sink sister site size skill skin skirt sky
sleep slice slope slot smoke snake snow soap society sock sofa soil soldier solution son
song sort soul sound soup source south space spade spark speaker species speech speed spell spider
spirit spoon sport spot spring squad square stable staff stage stair stamp star start state
station statue steam steel stem step stick stock stomach stone storage store storm story stove
stranger straw stream street string strip student studio subject success sugar suit summer sun
supper supply surface surgeon survey sword symbol system tail tailor tale talk tank target task
taste tax tea teacher team tear telephone temple tenant tent term territory test theater theory
thief thing thorn thought thread threat throat throne thumb thunder ticket tide tie tiger timber
time tin tip tire title toast tobacco toe tomato tone tongue tool tooth top topic total tour towel
tower town toy track trade traffic trail train trap travel tray treasure treaty tree trend trial
tribe trick trip troop truck trumpet trunk trust truth tube tunnel turkey turn twin type uncle
union unit university user valley value valve van vehicle vein velvet verse vessel victim victory
view village vine violin virtue vision visit visitor voice volcano volume vote voyage wagon waist
waiter walk wall war warrior watch water wave wax way weather web wedding week weight west whale
wheat wheel whip whisper wife wind window wine wing winner winter wire wish witch witness wolf
woman wood wool word work worker world worm wound wrist writer yard year yellow youth zebra zone
""".split()  # noqa: SIM905

# Of introductions without a meaning.
COMMON_WORDS = """
the a of and to is that for it was with as his on be at by I had not are but from or have they
which one you were all her she there would their we him been has when who will no more if out so
below above here some many each every please read keep know need list table data text words first
next later again only these those this
""".split()  # noqa: SIM905
